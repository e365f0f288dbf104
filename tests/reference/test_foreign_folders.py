"""Folders that other tools quantized: what they mean by their owners is what we read and run.

GPTQ, AWQ and FP8 folders are written by plain loops after their owners' layouts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from tests.conftest import write_checkpoint
from tests.reference import packers
from tests.reference.foreign import ALL, WIDE, assert_means, labels, our_linears

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


# GPTQ


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("w4-g32-sym", {"midpoint": True}),
        ("w4-g32-asym", {}),
        ("w4-g32-asym", {"v2": True}),
        ("w4-channel-sym", {"group": -1, "midpoint": True}),
        ("w2-g16-asym", {"bits": 2, "group": 16}),
        ("w3-g32-asym", {"bits": 3}),
        ("w8-channel-asym", {"bits": 8, "group": -1, "index": False}),
        ("w8-g32-sym", {"bits": 8, "midpoint": True, "v2": True, "scales": ml_dtypes.bfloat16}),
        ("w4-g32-asym", {"order": True, "scales": np.float32}),
        ("w4-g16-sym", {"group": 16, "order": True, "midpoint": True}),
    ],
    ids=str,
)
def test_a_gptq_folder_means_what_its_owner_says(tmp_path: Path, label: str, options: dict[str, Any]) -> None:
    folder = packers.gptq(tmp_path / "gptq", **options)
    checkpoint = open_checkpoint(folder.path)
    assert labels(folder.path) == {label}
    assert len(checkpoint.schemes) == ALL
    assert len(checkpoint.reordered) == (ALL if options.get("order") else 0)
    assert_means(folder)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_takes_one_off_whole_words(tmp_path: Path, bits: int) -> None:
    meta = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    folder = packers.gptq(tmp_path / "gptq", bits, borrow=True, **meta)
    assert any((zeros == 0).any() for zeros in folder.zeros.values())
    assert_means(folder)


@pytest.mark.parametrize("sym", [True, False])
def test_the_stored_zero_points_say_whether_it_is_symmetric(tmp_path: Path, sym: bool) -> None:
    assert labels(packers.gptq(tmp_path / "asym", sym=sym).path) == {"w4-g32-asym"}
    assert labels(packers.gptq(tmp_path / "sym", midpoint=True, sym=sym).path) == {"w4-g32-sym"}


def test_autogptq_wrote_its_configuration_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = packers.gptq(tmp_path / "gptq")
    values = json.loads((folder.path / "config.json").read_text())
    said = values.pop("quantization_config")
    (folder.path / "config.json").write_text(json.dumps(values))
    (folder.path / "quantize_config.json").write_text(
        json.dumps({key: said[key] for key in ("bits", "group_size", "sym", "desc_act")})
    )
    assert_means(folder)
    assert "quantize_config.json" not in [path.name for path in open_checkpoint(folder.path).sidecars()]


def test_a_bias_of_zeros_is_none(tmp_path: Path) -> None:
    folder = packers.gptq(tmp_path / "gptq")
    for name, weight in folder.weights.items():
        folder.tensors[f"{name}.bias"] = np.zeros(len(weight), np.float16)
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    assert_means(folder)


def test_negative_scales_are_known(tmp_path: Path) -> None:
    folder = packers.gptq(tmp_path / "gptq", midpoint=True)
    name = next(iter(folder.weights))
    folder.tensors[f"{name}.scales"] = -folder.tensors[f"{name}.scales"]
    folder.weights[name] = -folder.weights[name]
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    assert labels(folder.path) == {"w4-g32-signed"}
    assert_means(folder)


def test_dynamic_rules_of_gptqmodel(tmp_path: Path) -> None:
    rules = {r"+:.*\.down_proj": {"bits": 8, "group_size": 16}, r"-:.*\.0\.self_attn": {}, r".*o_proj": {"sym": False}}
    folder = packers.gptq(tmp_path / "four", midpoint=True, dynamic=rules)
    eight = packers.gptq(tmp_path / "eight", 8, 16, midpoint=True)
    for source, target in ((eight, "down_proj"), (None, ".0.self_attn")):
        for name in [n for n in folder.weights if target in n]:
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                del folder.tensors[f"{name}.{part}"]
            if source is None:
                folder.tensors[f"{name}.weight"] = folder.weights[name]
            else:
                folder.tensors.update({n: a for n, a in source.tensors.items() if n.startswith(f"{name}.")})
                folder.weights[name] = source.weights[name]
    write_checkpoint(folder.path, json.loads((folder.path / "config.json").read_text()), folder.tensors)
    assert labels(folder.path) == {"w4-g32-sym", "w8-g16-sym"}
    assert len(open_checkpoint(folder.path).schemes) == ALL - 4
    assert_means(folder)


# AWQ and FP8


@pytest.mark.parametrize(
    ("label", "options"),
    [
        ("w4-g32-asym", {}),
        ("w4-g32-sym", {"midpoint": True, "version": "GEMM"}),
        ("w4-channel-asym", {"group": -1, "modules_to_not_convert": ["lm_head"]}),
    ],
    ids=str,
)
def test_an_awq_folder_means_what_its_owner_says(tmp_path: Path, label: str, options: dict[str, Any]) -> None:
    folder = packers.awq(tmp_path / "awq", **options)
    assert labels(folder.path) == {label}
    assert_means(folder)


@pytest.mark.parametrize("scales", [ml_dtypes.bfloat16, np.float32])
def test_an_official_fp8_folder_means_what_its_owner_says(tmp_path: Path, scales: Any) -> None:
    folder = packers.fp8(tmp_path / "fp8", WIDE, scales=scales, plain="o_proj")
    checkpoint = open_checkpoint(folder.path)
    assert labels(folder.path) == {"fp8-128x128-dynamic-group"}
    assert len(checkpoint.schemes) == ALL - 2
    assert_means(folder)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        parts = x.reshape(len(x), -1, 128)
        scale = parts.abs().amax(-1, keepdim=True) / 448
        return ((parts / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)

    for name, x, found in our_linears(folder.path):
        wanted = (x if "o_proj" in name else rounded(x)) @ torch.from_numpy(folder.weights[name]).T
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
