"""Quantized checkpoint folders: numbers, bits, and manifests that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import MANIFEST, read_manifest
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import InputError
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.conftest import tiny_config, write_checkpoint
from tests.unit.core.checkpoints import Q_PROJ, Tensors, assert_holds, refuses

RULES = [
    {"match": "*.mlp.*", "scheme": {"num_bits": 4, "symmetric": False, "group_size": 16}},
    {"match": "*.o_proj", "scheme": None},
    {"match": "*", "scheme": {"num_bits": 8, "group_size": 32}},
]


@pytest.fixture
def mixed(tmp_path: Path, tensors: Tensors) -> Path:
    """A folder with 4-bit asymmetric, 8-bit symmetric and 16-bit linears."""
    source = write_checkpoint(tmp_path / "source", tiny_config(), tensors)
    recipe = Recipe.from_dict({"name": "mixed", "method": "rtn", "rules": RULES}, "test")
    quantize(open_checkpoint(source), recipe, tmp_path / "mixed", QuantizeSettings())
    return tmp_path / "mixed"


def test_a_quantized_folder_holds_what_its_manifest_says(mixed: Path, tensors: Tensors) -> None:
    checkpoint, manifest = open_checkpoint(mixed), read_manifest(mixed)["tensors"]
    assert checkpoint.is_quantized
    for module in checkpoint.config.all_linears():
        found, wanted = checkpoint.linear(module), tensors[f"{module}.weight"]
        if module.endswith("o_proj"):
            assert isinstance(found, np.ndarray)
            assert found.tobytes() == wanted.tobytes()
            continue
        assert isinstance(found, QuantizedTensor)
        assert found.scheme.num_bits == (4 if ".mlp." in module else 8)
        exact = wanted.astype(np.float64)
        error = ((dequantize(found) - exact) ** 2).sum() / (exact**2).sum()
        assert manifest[module]["error"] == pytest.approx(error, rel=1e-4)
        assert 0 < error < 0.01


def test_everything_that_is_not_quantized_is_copied_bit_for_bit(mixed: Path, tensors: Tensors) -> None:
    checkpoint = open_checkpoint(mixed)
    plain = {name: value for name, value in tensors.items() if name.removesuffix(".weight") not in checkpoint.schemes}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"} < set(plain)
    assert_holds(checkpoint, plain)


def test_bits_per_weight_are_those_of_the_files(mixed: Path) -> None:
    checkpoint = open_checkpoint(mixed)
    stored = sum(array.nbytes for name in checkpoint.files for array in [checkpoint.read(name)])
    assert checkpoint.bits_per_weight == 8 * stored / checkpoint.config.num_parameters


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    edit(values)
    (folder / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["tensors"].update({"model.norm": m["tensors"][Q_PROJ]}), "model.norm is no linear of this model"),
        (lambda m: m["tensors"].pop(Q_PROJ), f"tensor {Q_PROJ}.weight .* is missing"),
        (lambda m: m["tensors"].update({Q_PROJ: 3}), f"{Q_PROJ} has no scheme"),
        (lambda m: m["tensors"][Q_PROJ].update(scheme="w8"), f"{Q_PROJ} has no scheme"),
        (lambda m: m["tensors"][Q_PROJ]["scheme"].update(num_bits=4), "weight_packed has shape"),
        (lambda m: m["tensors"][Q_PROJ]["scheme"].update(scale_dtype="fp32"), "weight_scale is stored as bfloat16"),
        (lambda m: m["tensors"][Q_PROJ]["scheme"].update(group_size=128), "64 inputs are not divisible"),
        (lambda m: m["tensors"][Q_PROJ]["scheme"].update(num_bits=5), "num_bits: 5"),
        (lambda m: m.update(layout="tarball"), "layout 'tarball'"),
    ],
)
def test_a_manifest_that_does_not_fit_its_tensors_is_refused(
    mixed: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(mixed, edit)
    with pytest.raises(InputError, match=message):
        open_checkpoint(mixed)


def test_without_its_manifest_a_folder_is_read_as_one_of_another_tool(mixed: Path) -> None:
    before = open_checkpoint(mixed)
    (mixed / MANIFEST).unlink()
    after = open_checkpoint(mixed)
    assert after.schemes == before.schemes
    np.testing.assert_array_equal(after.linear(Q_PROJ).codes, before.linear(Q_PROJ).codes)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by gptq, as it says, but every linear is stored in 16 bits"),
        (
            {"quant_method": "hqq"},
            "quant_method 'hqq'; gptq, awq, fp8, compressed-tensors, modelopt, auto-round can be read",
        ),
        ("awq", "an object was expected, found str"),
        (["fp8"], "an object was expected, found list"),
    ],
)
def test_a_quantization_that_is_not_there_or_not_known_is_refused(
    make_checkpoint: Callable[..., Path], quantization: Any, message: str
) -> None:
    refuses(make_checkpoint(tiny_config(quantization_config=quantization)), message)
