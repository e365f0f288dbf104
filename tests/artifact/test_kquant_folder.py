"""A folder of ggml's block types: opened, described, run by torch, and moved into a GGUF file bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.gguf_header import read_gguf_header
from qwen3_export.core.gguf_types import FILE_TYPES, module_types
from qwen3_export.core.layouts import layout
from qwen3_export.core.manifest import write_manifest
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import scheme_of_type
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.errors import CheckpointError, RecipeError, UnsupportedError
from qwen3_export.ggml import round_rows
from qwen3_export.ship import onnx
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.artifact.support import VOCABULARY, logits, mean_kl, random_ids, with_tokenizer
from tests.cli.helpers import call
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint

CONFIGS = {
    "dense": tiny_config(hidden_size=256, intermediate_size=512, vocab_size=VOCABULARY, head_dim=64),
    "moe": tiny_moe_config(
        hidden_size=256, moe_intermediate_size=256, vocab_size=VOCABULARY, head_dim=64, num_experts=4
    ),
}
RECIPE = {"name": "gguf-mix", "method": "rtn", "rules": [{"match": "*", "scheme": "q4_k"}], "layout": "ggml"}


def sources(folder: Path, reference_folder: Path, kind: str) -> Path:
    tensors = random_tensors(parse_config(CONFIGS[kind], "test"))
    return with_tokenizer(write_checkpoint(folder, CONFIGS[kind], tensors), reference_folder)


def quantized(source: Path, folder: Path, reference_folder: Path, name: str) -> Path:
    """The source rounded onto a mix, as a folder that a solver would write."""
    checkpoint, arrays, ggml = open_checkpoint(source), dict[str, np.ndarray](), layout("ggml")
    types, schemes = module_types(checkpoint.config, name), {}
    for tensor in checkpoint.files:
        module = tensor.removesuffix(".weight")
        if module not in types:
            arrays[tensor] = checkpoint.read(tensor)
            continue
        schemes[module] = scheme_of_type(types[module])
        arrays.update(ggml.pack(round_rows(module, checkpoint.read(tensor), schemes[module]).tensor))
    folder.mkdir()
    write_tensors(folder / "model.safetensors", arrays.items())
    config = {
        **checkpoint.raw_config,
        "quantization_config": ggml.config(schemes, list(checkpoint.config.all_linears())),
    }
    (folder / "config.json").write_text(json.dumps(config))
    items = {
        m: {"method": "rtn", "scheme": scheme.to_dict(), "error": 0.0, "tokens": 0} for m, scheme in schemes.items()
    }
    values: dict[str, Any] = {
        "source": {"name": "tiny", "sha256": checkpoint.sha256},
        "recipe": RECIPE,
        "experts": None,
    }
    write_manifest(folder, "quantized-checkpoint", {**values, "layout": "ggml", "tensors": items})
    return with_tokenizer(folder, reference_folder)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("name", ["q4_k_m", "iq4_xs", "q4_0"])
def test_codes_move_into_the_file_that_rounding_at_once_writes(
    tmp_path: Path, reference_folder: Path, name: str, kind: str
) -> None:
    source = sources(tmp_path / "source", reference_folder, kind)
    folder = quantized(source, tmp_path / "quantized", reference_folder, name)
    checkpoint = open_checkpoint(folder)
    result = export_gguf(checkpoint, tmp_path / "moved.gguf")
    export_gguf(open_checkpoint(source), tmp_path / "rounded.gguf", name)
    moved, rounded = (read_gguf_header(tmp_path / f"{label}.gguf") for label in ("moved", "rounded"))
    assert [(t.name, t.type, t.shape) for t in moved.tensors] == [(t.name, t.type, t.shape) for t in rounded.tensors]
    for mine, other in zip(moved.tensors, rounded.tensors, strict=True):
        data = [
            np.fromfile(tmp_path / f"{label}.gguf", np.uint8, t.bytes, offset=t.begin)
            for label, t in (("moved", mine), ("rounded", other))
        ]
        np.testing.assert_array_equal(data[0], data[1], mine.name)
    assert result["exact"]
    assert moved.values["general.file_type"] == FILE_TYPES[name].number
    assert result["bits_per_weight"] == pytest.approx(checkpoint.bits_per_weight, rel=0.02)


def test_torch_runs_the_folder(tmp_path: Path, reference_folder: Path) -> None:
    folder = quantized(
        sources(tmp_path / "source", reference_folder, "moe"), tmp_path / "q", reference_folder, "q5_k_m"
    )
    export_gguf(open_checkpoint(folder), tmp_path / "model.gguf")
    ids = [random_ids(48, 8185)]
    assert mean_kl(logits(folder, ids), logits(tmp_path / "model.gguf", ids)) < 0.05


def test_inspect_says_which_types(tmp_path: Path, reference_folder: Path) -> None:
    folder = quantized(
        sources(tmp_path / "source", reference_folder, "dense"), tmp_path / "q", reference_folder, "q4_k_m"
    )
    values = call("inspect", folder, "--json").json
    types = list(module_types(open_checkpoint(folder).config, "q4_k_m").values())
    assert values["quantized"] == {name: types.count(name) for name in set(types)}
    assert values["embedding"] == "q6_k"
    assert 4 < values["bits_per_weight"] < 7


def test_others_refuse_the_folder_by_name(tmp_path: Path, reference_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = quantized(
        sources(tmp_path / "source", reference_folder, "dense"), tmp_path / "q", reference_folder, "q4_k_m"
    )
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="block type of ggml"):
        onnx.export_onnx(open_checkpoint(folder), tmp_path / "onnx")
    (folder / "qwen3-export.json").unlink()
    with pytest.raises(CheckpointError, match="qwen3-export-ggml"):
        open_checkpoint(folder)


def test_a_recipe_names_types(tmp_path: Path, reference_folder: Path) -> None:
    recipe = Recipe.from_dict(RECIPE, "test")
    assert recipe.rules[0].scheme == scheme_of_type("q4_k")
    assert Recipe.from_dict(recipe.to_dict(), "again") == recipe
    with pytest.raises(RecipeError, match="'q4_x' is no ggml type"):
        Recipe.from_dict({**RECIPE, "rules": [{"match": "*", "scheme": "q4_x"}]}, "test")
    wrong = {"type": "kquant", "ggml_type": "q4_k", "group_size": 64}
    with pytest.raises(RecipeError, match="group_size is 64 beside ggml_type q4_k, whose is 32"):
        Recipe.from_dict({**RECIPE, "rules": [{"match": "*", "scheme": wrong}]}, "test")


def test_a_row_that_blocks_do_not_divide_is_refused_first(tmp_path: Path, reference_folder: Path) -> None:
    source = with_tokenizer(write_checkpoint(tmp_path / "narrow", tiny_config(vocab_size=VOCABULARY)), reference_folder)
    with pytest.raises(RecipeError, match="not divisible by 256, the block of q4_k"):
        quantize(open_checkpoint(source), Recipe.from_dict(RECIPE, "test"), tmp_path / "out", QuantizeSettings())
    assert not (tmp_path / "out").exists()
