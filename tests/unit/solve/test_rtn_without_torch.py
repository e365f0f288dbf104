"""Rounding to nearest without torch: the same bytes as with it, where it serves, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.recipe import Recipe, load_recipe
from qwen3_export.errors import CheckpointError, MissingRuntimeError, RecipeError
from qwen3_export.solve.blocks import rtn_without_torch
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint

WIDE = {"hidden_size": 128, "intermediate_size": 256}
CONFIGS = {
    "dense": tiny_config(**WIDE),
    "untied": tiny_config(**WIDE, tie_word_embeddings=False, num_hidden_layers=3),
    "moe": tiny_moe_config(**WIDE, moe_intermediate_size=64),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "w4": {"num_bits": 4, "group_size": 64},
    "w4-asym": {"num_bits": 4, "group_size": 32, "symmetric": False, "scale_dtype": "fp16"},
    "w3-signed": {"num_bits": 3, "group_size": 32, "signed_scales": True},
    "w8-channel": {"num_bits": 8, "strategy": "channel", "activations": "dynamic-token"},
}
# Runs the command line where an import of torch fails, as on a machine without it.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("there is no torch here")
sys.meta_path.insert(0, Refuse())
from qwen3_export.cli import main
main()
"""


def recipe(scheme: dict[str, Any], **options: Any) -> Recipe:
    rules = [{"match": "*.0.*.v_proj", "scheme": None}, {"match": "*", "scheme": scheme}]
    return Recipe.from_dict({"name": "test", "method": "rtn", "rules": rules, "options": options}, "test")


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest, which names the libraries."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "qwen3-export.json"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_it_makes_the_bytes_that_torch_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], scheme: dict[str, Any], dtype: Any
) -> None:
    source, chosen = open_checkpoint(write_checkpoint(tmp_path / "source", config)), recipe(scheme)
    if dtype == np.float32:
        tensors = {name: source.read(name).astype(np.float32) * 1.0009765625 for name in source.files}
        source = open_checkpoint(write_checkpoint(tmp_path / "fp32", config, tensors))
    assert rtn_without_torch.serves(source, chosen)
    quantize(source, chosen, tmp_path / "plain", QuantizeSettings(threads=2))
    with monkeypatch.context() as patch:
        patch.setattr(rtn_without_torch, "serves", lambda *_: False)
        quantize(source, chosen, tmp_path / "torch", QuantizeSettings())
    assert files(tmp_path / "plain") == files(tmp_path / "torch")
    plain, with_torch = (read_manifest(tmp_path / name) for name in ("plain", "torch"))
    assert set(plain["versions"]) == {"qwen3-export", "numba"}
    assert set(with_torch["versions"]) == {"qwen3-export", "torch", "numba"}
    assert plain["tensors"].keys() == with_torch["tensors"].keys()
    for name, item in plain["tensors"].items():
        assert item == {**with_torch["tensors"][name], "error": pytest.approx(with_torch["tensors"][name]["error"])}


def test_pieces_and_threads_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, chosen = open_checkpoint(write_checkpoint(tmp_path / "source", CONFIGS["dense"])), recipe(SCHEMES["w4"])
    quantize(source, chosen, tmp_path / "whole", QuantizeSettings(threads=1))
    monkeypatch.setattr(rtn_without_torch, "ROUNDED_AT_ONCE", 1000)
    quantize(source, chosen, tmp_path / "cut", QuantizeSettings(threads=3))
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


@pytest.mark.parametrize("arguments", [(), ("--layout", "gptq"), ("--layout", "awq")])
def test_the_command_needs_no_torch(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    source, made = write_checkpoint(tmp_path / "source", CONFIGS["dense"]), tmp_path / "made"
    given = ["quantize", str(source), "--recipe", "rtn-w4a16-g32", "--output", str(made), *arguments]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    layout = arguments[1] if arguments else None
    quantize(
        open_checkpoint(source), load_recipe("rtn-w4a16-g32"), tmp_path / "wanted", QuantizeSettings(layout=layout)
    )
    assert files(made) == files(tmp_path / "wanted")


@pytest.mark.parametrize("name", ["gptq-w4a16-g128", "fp8-dynamic", "rtn-weighted-w4a16-g128", "awq-w4a16-g128"])
def test_other_recipes_say_that_they_need_torch(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "source", CONFIGS["dense"])
    given = ["quantize", str(source), "--recipe", name, "--output", str(tmp_path / "made")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *given], capture_output=True, text=True, check=False)
    assert done.returncode == MissingRuntimeError.exit_code, done.stderr
    assert done.stderr.endswith("\nerror: quantizing needs torch\nhint: pip install 'qwen3-export[solve]'\n")
    assert done.stderr.startswith("warning: source has no tokenizer.json")
    assert not (tmp_path / "made").exists()


def test_what_runs_the_model_is_left_to_torch(tmp_path: Path) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "source", CONFIGS["dense"]))
    w4 = SCHEMES["w4"]
    assert rtn_without_torch.serves(source, recipe(w4, scale_search="absmax"))
    assert not rtn_without_torch.serves(source, recipe(w4, scale_search="hessian"))
    assert not rtn_without_torch.serves(source, recipe(w4, fold="awq"))
    assert not rtn_without_torch.serves(source, recipe({**SCHEMES["w8-channel"], "activations": "static-tensor"}))
    assert not rtn_without_torch.serves(source, recipe({"num_bits": 8, "type": "float", "strategy": "channel"}))
    nvfp4 = {"num_bits": 4, "type": "float", "group_size": 16, "scale_dtype": "e4m3"}
    assert not rtn_without_torch.serves(source, recipe({**nvfp4, "activations": "dynamic-group"}))
    outer = {"match": "model.embed_tokens", "scheme": w4}
    values = {**recipe(w4).to_dict(), "rules": [outer, {"match": "*", "scheme": w4}]}
    assert not rtn_without_torch.serves(source, Recipe.from_dict(values, "test"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, make_checkpoint: Callable[..., Path], bad: float) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "source", CONFIGS["dense"]))
    tensors = {name: source.read(name) for name in source.files}
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight"][5, 7] = bad
    broken = open_checkpoint(make_checkpoint(CONFIGS["dense"], tensors, "broken"))
    with pytest.raises(CheckpointError, match=f"{name}.weight: it holds NaN or infinity"):
        quantize(broken, recipe(SCHEMES["w4"]), tmp_path / "out", QuantizeSettings())


def test_finite_weights_too_large_for_their_sums_are_told_apart(tmp_path: Path) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "source", CONFIGS["dense"]))
    tensors = {name: source.read(name) for name in source.files}
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 1e30
    large = open_checkpoint(write_checkpoint(tmp_path / "large", CONFIGS["dense"], tensors))
    with pytest.raises(RecipeError, match=r"mlp\.up_proj: its error is not finite"):
        quantize(large, recipe(SCHEMES["w4"]), tmp_path / "out", QuantizeSettings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "source"]
