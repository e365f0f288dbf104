"""Checkpoints whose tensors are named or stacked as other tools do it: the logits of transformers, exactly ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.errors import CheckpointError
from qwen3_export.model.decoder import Decoder
from tests.artifact.support import tiny_with_tokenizer
from tests.cli.helpers import call, refused
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint

Tensors = dict[str, Any]
IDS = np.arange(3, 67, 3, dtype=np.int32)


def _prefix(before: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{before}{name}": array for name, array in tensors.items()}


def _inner(tensors: Tensors) -> Tensors:
    """As compiled layers are saved: the wrapper's name in the middle."""
    return {name.replace("layers.1.", "layers.1._orig_mod."): array for name, array in tensors.items()}


def _bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): array for name, array in tensors.items()}


def _fused(tensors: Tensors) -> Tensors:
    """Experts in stacks, as the module of transformers 5 holds them."""
    found = {name: array for name, array in tensors.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(8)]) for part in ("gate", "up", "down")
        )
        found |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], 1), f"{prefix}.down_proj": down}
    return found


def _logits(folder: Path) -> np.ndarray:
    decoder = Decoder(open_checkpoint(folder))
    return decoder.logits(decoder.hidden([IDS], [decoder.new_caches()])[0]).numpy()


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "compiled": (tiny_config(), _prefix("_orig_mod.")),
    "compiled layers": (tiny_config(), _inner),
    "distributed and compiled": (tiny_config(tie_word_embeddings=False), _prefix("module._orig_mod.")),
    "wrapped": (tiny_config(tie_word_embeddings=False), _prefix("model.")),
    "without model.": (tiny_config(), _bare),
    "without model., with a head": (tiny_config(tie_word_embeddings=False), _bare),
    "fused experts": (tiny_moe_config(), _fused),
    "fused experts of a compiled model": (tiny_moe_config(), lambda tensors: _prefix("_orig_mod.")(_fused(tensors))),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_logits_are_those_of_the_usual_names_and_of_transformers(tmp_path: Path, name: str) -> None:
    config, change = CASES[name]
    tensors = random_tensors(parse_config(config, "test"))
    usual = write_checkpoint(tmp_path / "usual", config, tensors)
    other = write_checkpoint(tmp_path / "other", config, change(tensors))
    found = _logits(other)
    np.testing.assert_array_equal(found, _logits(usual))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(usual, dtype=torch.float32, attn_implementation="eager")
        wanted = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_transformers_own_module_names_of_experts_are_read(tmp_path: Path) -> None:
    """The state of the module itself, as trainers that bypass save_pretrained write it."""
    config = tiny_moe_config()
    usual = write_checkpoint(tmp_path / "usual", config)
    model = AutoModelForCausalLM.from_pretrained(usual, dtype=torch.bfloat16)
    state = {
        name: tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    np.testing.assert_array_equal(_logits(write_checkpoint(tmp_path / "state", config, state)), _logits(usual))


def test_exports_of_stacks_have_the_bytes_of_the_usual_folder(tmp_path: Path) -> None:
    config = tiny_moe_config(hidden_size=64, moe_intermediate_size=64)
    tensors = random_tensors(parse_config(config, "test"))
    folders = [
        write_checkpoint(tmp_path / name / "model", config, made)
        for name, made in (("a", tensors), ("b", _fused(tensors)))
    ]
    for folder in folders:
        outcome = call("quantize", folder, "--recipe", "rtn-w4a16-g32", "--output", folder.parent / "out")
        assert outcome.code == 0, outcome.err
    shards = [sorted((folder.parent / "out").glob("*.safetensors")) for folder in folders]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


@pytest.mark.parametrize("exact", [True, False])
def test_an_fp32_copy_of_a_tied_head_is_the_head(tmp_path: Path, exact: bool) -> None:
    """transformers multiplies by the embedding; a copy that rounds to it is no other head."""
    tensors = random_tensors(parse_config(tiny_config(), "test"))
    copy = tensors["model.embed_tokens.weight"].astype(np.float32)
    if not exact:
        copy *= np.float32(1 + 2**-12)
    usual = write_checkpoint(tmp_path / "usual", tiny_config(), tensors)
    other = write_checkpoint(tmp_path / "other", tiny_config(), {**tensors, "lm_head.weight": copy})
    np.testing.assert_array_equal(_logits(other), _logits(usual))
    write_checkpoint(tmp_path / "third", tiny_config(), {**tensors, "lm_head.weight": copy * 2})
    with pytest.raises(CheckpointError, match="ties lm_head to the embedding"):
        open_checkpoint(tmp_path / "third")


@pytest.mark.filterwarnings("ignore:.*attn_factor beside YaRN")
def test_attn_factor_beside_yarn_is_warned_of_and_left_as_transformers_leaves_it(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    usual = write_checkpoint(tmp_path / "usual", tiny_config(rope_scaling=yarn))
    config = tiny_config(rope_scaling={**yarn, "attn_factor": 1.7})
    other = write_checkpoint(tmp_path / "other", config)
    outcome = call("inspect", other)
    assert outcome.code == 0
    assert outcome.err.count("warning: ") == 1
    assert "attn_factor" in outcome.err
    assert "warning" not in call("inspect", other, "--quiet").err
    with pytest.warns(UserWarning, match="attn_factor"):
        np.testing.assert_array_equal(_logits(other), _logits(usual))


def _score(tensors: Tensors) -> Tensors:
    return {**tensors, "score.weight": np.ones((2, 64), ml_dtypes.bfloat16)}


def _lora(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 64), ml_dtypes.bfloat16)}


def _twice(tensors: Tensors) -> Tensors:
    return {**tensors, "_orig_mod.model.norm.weight": tensors["model.norm.weight"]}


def _transposed(tensors: Tensors) -> Tensors:
    return {n: np.ascontiguousarray(a.swapaxes(1, 2)) if a.ndim == 3 else a for n, a in _fused(tensors).items()}


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (tiny_config(), _score, ("score.weight", "classifier", "Qwen3ForCausalLM")),
        (tiny_config(), _lora, ("LoRA", "merge_and_unload")),
        (tiny_config(), _twice, ("both the tensor model.norm.weight",)),
        (
            tiny_moe_config(),
            _transposed,
            ("gate_up_proj has shape [8, 64, 96], [8, 96, 64] was expected", "transposed"),
        ),
    ],
)
def test_what_is_no_such_model_is_refused_by_name_with_the_remedy(
    tmp_path: Path, config: dict[str, Any], change: Callable[[Tensors], Tensors], words: tuple[str, ...]
) -> None:
    folder = write_checkpoint(tmp_path / "model", config, change(random_tensors(parse_config(config, "test"))))
    refused(call("inspect", folder), 2, *words)


def test_an_adapter_and_bitsandbytes_are_refused_by_name_with_the_remedy(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    write_tensors(
        adapter / "adapter_model.safetensors", [("base_model.model.x.lora_A.weight", np.ones((2, 2), np.float32))]
    )
    refused(call("quantize", adapter, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out"), 2, "PEFT", "merge")
    folder = write_checkpoint(tmp_path / "bnb", tiny_config())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    refused(call("inspect", folder), 2, "bitsandbytes", "dequantize")


def test_the_asymmetric_gptq_layout_is_warned_of_with_layouts_that_load(tmp_path: Path, reference_folder: Path) -> None:
    recipe = tmp_path / "asym.yaml"
    recipe.write_text(
        "name: asym\nmethod: rtn\nrules:\n"
        "  - {match: '*', scheme: {num_bits: 4, symmetric: false, strategy: group, group_size: 32}}\n"
    )
    folder = tiny_with_tokenizer(
        tmp_path / "model", reference_folder, tiny_config(hidden_size=64, intermediate_size=96)
    )
    outcome = call("quantize", folder, "--recipe", recipe, "--layout", "gptq", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("warning: ") == 1
    assert "--layout awq" in outcome.err
    assert "--layout compressed-tensors" in outcome.err
    fine = call("quantize", folder, "--recipe", "rtn-w4a16-g32", "--layout", "gptq", "--output", tmp_path / "sym")
    assert "warning" not in fine.err
