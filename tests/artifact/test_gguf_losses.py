"""Tensors that a GGUF type would lose are refused before a file is begun; others are encoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship import gguf
from qwen3_export.ship.gguf import Options, encode, export_gguf
from tests.artifact.support import VOCABULARY, round_to_nearest, with_tokenizer
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint

# The last matrix of a file.
LAST = "model.layers.1.self_attn.v_proj"
EXPERT = "model.layers.1.mlp.experts.7.up_proj"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, reference_folder: Path) -> Make:
    """Writes a tiny model whose tensor is multiplied by a number."""

    def write(tensor: str, factor: float, config: dict[str, Any] | None = None) -> Path:
        config = {**(config or tiny_config()), "vocab_size": VOCABULARY}
        tensors = random_tensors(parse_config(config, "test"))
        changed = tensors[f"{tensor}.weight"]
        tensors[f"{tensor}.weight"] = (changed.astype(np.float32) * factor).astype(changed.dtype)
        return with_tokenizer(write_checkpoint(tmp_path / "model", config, tensors), reference_folder)

    return write


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a file is begun."""

    def begin(*_: object) -> None:
        raise AssertionError("a file was begun")

    monkeypatch.setattr(gguf, "write_shard", begin)


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize("factor", [1e-9, 1e-30, 1e9])
@pytest.mark.parametrize("kind", ["f16", "q4_0", "q8_0", "q4_1", "q4_k_m"])
def test_the_last_tensor_is_refused_before_a_file_is_begun(
    make: Make, tmp_path: Path, kind: str, factor: float
) -> None:
    source = open_checkpoint(make(LAST, factor))
    with pytest.raises(UnsupportedError, match=rf"{LAST}\.weight(\.scales)?: (in .* it loses|its values overflow)"):
        export_gguf(source, tmp_path / "out" / "model.gguf", kind, options=Options(split_max_bytes=1 << 20))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unwritten")
def test_one_expert_of_a_stack_is_refused_before_a_file_is_begun(make: Make, tmp_path: Path) -> None:
    source = open_checkpoint(make(EXPERT, 1e-9, tiny_moe_config(moe_intermediate_size=64)))
    with pytest.raises(UnsupportedError, match=f"{EXPERT}.weight: in q8_0 it loses"):
        export_gguf(source, tmp_path / "model.gguf", "q8_0")


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(("kind", "part"), [(None, "scales"), ("q8_0", "weight")])
def test_scales_of_codes_are_looked_at_too(make: Make, tmp_path: Path, kind: str | None, part: str) -> None:
    """Codes that are moved keep their scales, in fp16; codes that are rounded again are numbers first."""
    scheme = next(rule.scheme for rule in load_recipe("rtn-w4a16-g32").rules if rule.scheme)
    quantized = round_to_nearest(make(LAST, 1), tmp_path / "quantized", ("*", scheme)).folder
    file = open_checkpoint(quantized).files[f"{LAST}.weight_scale"]
    tensors = {name: file.read(name) for name in file.entries}
    scales = tensors[f"{LAST}.weight_scale"]
    tensors[f"{LAST}.weight_scale"] = (scales.astype(np.float32) * 1e-9).astype(scales.dtype)
    write_tensors(file.path, tensors.items())
    with pytest.raises(UnsupportedError, match=f"{LAST}.{part}: in .* it loses"):
        export_gguf(
            open_checkpoint(quantized), tmp_path / "model.gguf", kind, options=Options(allow_requantize=bool(kind))
        )


def test_tensors_far_from_the_limits_are_encoded_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only small numbers, which their type holds all the same, are encoded beforehand."""
    made: Counter[str] = Counter()
    real = encode.encode
    monkeypatch.setattr(encode, "encode", lambda name, *rest: (made.update([name]), real(name, *rest))[1])
    source = open_checkpoint(make(LAST, 1e-4))
    result = export_gguf(source, tmp_path / "model.gguf", "q8_0")
    assert made.pop(f"{LAST}.weight") == 2
    assert set(made.values()) == {1}
    assert {item["name"]: item["max_rel_error"] for item in result["inexact_tensors"]}[f"{LAST}.weight"] < 0.1
