"""Broken folders of GPTQ, AWQ and FP8: one CheckpointError that names what is wrong, before any code is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.errors import CheckpointError
from tests.conftest import write_checkpoint
from tests.reference import packers
from tests.unit.core.broken_folders import Q_PROJ, WIDE, Edit, add, drop, put, refuses, say


def index(change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    return put("g_idx", lambda old: change(old.copy()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("qweight", lambda a: a[:-1]), r"q_proj.qweight has shape \[7, 128\], config.json asks for \[8, 128\]"),
        (put("qweight", lambda a: a.astype(np.int64)), "q_proj.qweight is stored as int64; int32 was expected"),
        (put("qzeros", lambda a: a[:, :-1]), "q_proj.qzeros has shape"),
        (put("scales", lambda a: a[:1]), "q_proj.scales has shape"),
        (put("scales", lambda a: a.astype(np.float64)), "q_proj.scales is stored as float64; float16"),
        (put("scales", lambda a: a * np.float16("nan")), "q_proj.scales: it holds NaN or infinity"),
        (drop("qweight"), r"tensor .*q_proj.qweight \[8, 128\] is missing"),
        (drop("qzeros"), "q_proj.qzeros .* is missing"),
        (drop("scales"), "q_proj.scales .* is missing"),
        (index(lambda a: a[:-1]), "q_proj.g_idx has shape"),
        (index(lambda a: a.astype(np.int64)), "q_proj.g_idx is stored as int64"),
        (index(lambda a: a + 1), "g_idx: it puts inputs into the groups 1 to 2; 2 groups of 32 inputs each"),
        (index(lambda a: a - 1), "g_idx: it puts inputs into the groups -1 to 0; 2 groups"),
        (index(lambda a: a * 0), "g_idx: it puts inputs into the groups 0 to 0; 2 groups"),
        (add(f"{Q_PROJ}.bias", np.ones(128, np.float16)), "q_proj.bias: it is not zero"),
        (add(f"{Q_PROJ}.bias", np.ones(5, np.float16)), "q_proj.bias has shape"),
        (add(f"{Q_PROJ}.weight", np.ones((128, 64), np.float16)), "q_proj.weight belongs to no part"),
        (add("lm_head.qweight", np.ones((8, 320), np.int32)), "lm_head is quantized, which is not supported"),
        (add("model.embed_tokens.scales", np.ones(4, np.float16)), "model.embed_tokens is quantized"),
        (say(lm_head=True), "lm_head is quantized .lm_head: true."),
        (say(checkpoint_format="marlin"), "checkpoint_format 'marlin'; gptq and gptq_v2 can be read"),
        (say(checkpoint_format=None, format="gptq_p"), "checkpoint_format 'gptq_p'"),
        (say(pack_dtype="int64"), "pack_dtype 'int64'; int32 was expected"),
        (say(bits=5), r"num_bits: 5; one of \[2, 3, 4, 8\]"),
        (say(bits="4"), "num_bits: '4'"),
        (say(bits=None), "num_bits: None"),
        (say(bits=8), "q_proj.qweight has shape"),
        (say(group_size=0), "group_size is 0"),
        (say(group_size=128), "64 inputs are not divisible by group_size 128"),
        (say(group_size="64"), "group_size is '64'"),
        (say(group_size=16), "q_proj.qzeros has shape"),
        (say(dynamic={"+:[": {}}), "a malformed quantization_config"),
        (say(dynamic=["-:.*"]), "a malformed quantization_config"),
        (say(dynamic={"-:.*q_proj": {}}), "q_proj.weight .* is missing"),
        (say(dynamic={".*q_proj": {"bits": 8}}), "q_proj.qweight has shape"),
        (
            say(quant_method="aqlm"),
            "quant_method 'aqlm'; gptq, awq, fp8, compressed-tensors, modelopt, auto-round can be read",
        ),
        (say(quant_method=["gptq"]), "can be read"),
    ],
)
def test_gptq(tmp_path: Path, edit: Edit, message: str) -> None:
    refuses(packers.gptq(tmp_path / "gptq"), edit, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("qweight", lambda a: a.T), "q_proj.qweight has shape"),
        (put("qzeros", lambda a: a[:, :1]), "q_proj.qzeros has shape"),
        (drop("qzeros"), "q_proj.qzeros .* is missing"),
        (say(version="gemv"), "AWQ version 'gemv'; only gemm can be read"),
        (say(version=None, checkpoint_format="gemv_fast"), "AWQ version 'gemv_fast'"),
        (say(bits=8), "AWQ with bits: 8; 4 was expected"),
        (say(group_size=None), "group_size is None"),
    ],
)
def test_awq(tmp_path: Path, edit: Edit, message: str) -> None:
    refuses(packers.awq(tmp_path / "awq"), edit, message)


def nan_code(codes: np.ndarray) -> np.ndarray:
    changed = codes.copy()
    changed[3, 5] = ml_dtypes.float8_e4m3fn("nan")
    return changed


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("weight", nan_code), "q_proj: a code is E4M3's NaN"),
        (put("weight", lambda a: a[:-1]), "q_proj.weight has shape"),
        (put("weight", lambda a: a.view(np.int8)), "q_proj.weight is stored as int8; float8_e4m3fn was expected"),
        (put("weight_scale_inv", lambda a: a.T.repeat(2, 0)), "q_proj.weight_scale_inv has shape"),
        (put("weight_scale_inv", lambda a: a.view(np.uint16).view(np.int16)), "weight_scale_inv is stored as int16"),
        (put("weight_scale_inv", lambda a: a * a.dtype.type("inf")), "weight_scale_inv: it holds NaN or infinity"),
        (drop("weight_scale_inv"), "q_proj.weight_scale_inv .* is missing"),
        (drop("weight"), "q_proj.weight .* is missing"),
        (say(weight_block_size=None), r"weight_block_size None; \[128, 128\] was expected"),
        (say(weight_block_size=[128, 64]), r"weight_block_size \[128, 64\]"),
        (say(weight_block_size=["a", 128]), "block_shape"),
        (say(activation_scheme="static"), "activation_scheme 'static'; 'dynamic' was expected"),
        (say(fmt="e5m2"), "fmt 'e5m2'"),
    ],
)
def test_fp8(tmp_path: Path, edit: Edit, message: str) -> None:
    refuses(packers.fp8(tmp_path / "fp8", WIDE), edit, message)


@pytest.mark.parametrize("text", ["[4]", "{", "3"])
def test_a_broken_configuration_of_autogptq_is_named(tmp_path: Path, text: str) -> None:
    folder = packers.gptq(tmp_path / "gptq")
    values = json.loads((folder.path / "config.json").read_text())
    del values["quantization_config"]
    write_checkpoint(folder.path, copy.deepcopy(values), folder.tensors)
    (folder.path / "quantize_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: (a JSON object|not valid JSON)"):
        open_checkpoint(folder.path)
