"""`plan`: what it promises is what the commands then do; and the same check in front of exports with a recipe."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.recipe import ExpertRule, load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError, ResourceError
from qwen3_export.preflight.trial import Trial, as_starved, narrowed
from qwen3_export.text.samples import Samples
from tests.cli.helpers import call, hashes, names, refused, start, wait_for, write_text_model
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint

SHORT = ("--samples", "8", "--sequence-length", "64")


def _plan(*arguments: object) -> dict[str, Any]:
    outcome = call("plan", *arguments, "--json")
    assert outcome.code in (0, 2), outcome.err
    values: dict[str, Any] = json.loads(outcome.out)
    assert (outcome.code == 0) == values["possible"]
    return values


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def test_a_layout_that_is_only_read_is_a_reason(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nmethod: rtn\nlayout: modelopt\nrules: [{match: '*', scheme: {num_bits: 4}}]\n")
    planned = _plan("reference-model", "--recipe", recipe, "--no-time")
    assert not planned["possible"]
    assert "never written" in planned["reasons"][0]


def test_sizes_are_those_of_the_artifacts(tmp_path: Path) -> None:
    source, recipe = "reference-model", ("--recipe", "rtn-w4a16-g128")
    planned = _plan(source, *recipe, "--no-time")
    made = {}
    for layout in ("compressed-tensors", "gptq", "awq"):
        made[layout] = tmp_path / layout
        assert call("quantize", source, *recipe, "--layout", layout, "--output", made[layout]).code == 0
    quantized = made["compressed-tensors"]
    commands = {
        "onnx": ("onnx", quantized),
        "onnx-standard": ("onnx", quantized, "--flavor", "standard"),
        "gguf": ("gguf", quantized),
        "tensorrt": ("tensorrt", quantized, "--sm", "8.9"),
    }
    for name, command in commands.items():
        made[name] = tmp_path / f"made-{name}"
        result = call(*command, "--output", made[name], "--json").json
        assert name != "tensorrt" or result["build"]["predicted"] == planned["formats"]["tensorrt"]["build"]
    for name, path in made.items():
        assert planned["formats"][name]["bytes"] == pytest.approx(_bytes(path), rel=0.02), name


def test_time_is_measured(model: Path) -> None:
    found = _plan(model, "--recipe", "gptq-w4a16-g32", "--samples", 16, "--sequence-length", 64)
    assert found["seconds"] > 0
    assert found["peak_rss_bytes"] > 100e6


def fixed_trial(checkpoint: Any, recipe: Any, samples: Any, *given: Any) -> Trial:
    """In place of a real one, whose seconds vary."""
    return Trial(checkpoint.config, samples, {"advance": 2.0}, 3.0)


def test_time_grows_with_the_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_export.preflight import timing

    monkeypatch.setattr(timing, "run_trial", fixed_trial)
    found = [_plan(model, "--recipe", "gptq-w4a16-g32", "--samples", n, "--sequence-length", 64) for n in (2, 200)]
    assert 0 < found[0]["seconds"] < found[1]["seconds"]
    assert found[0]["disk_bytes"] < found[1]["disk_bytes"]


def test_the_table_has_what_was_asked_for(model: Path) -> None:
    common = ("plan", model, "--recipe", "gptq-w4a16-g32", "--no-time")
    everything, chosen = call(*common).out, call(*common, "--format", "onnx").out
    for word in ("vllm", "llama.cpp", "tensorrt", "awq"):
        assert word in everything
        assert word not in chosen
    assert "onnxruntime-genai" in chosen
    assert "onnx-standard" not in chosen


def test_impossible_memory_and_format(model: Path) -> None:
    scarce = _plan(model, "--recipe", "gptq-w4a16-g32", "--memory", "64MiB", "--no-time")
    assert any("--memory allows 64 MiB" in reason for reason in scarce["reasons"])
    chosen = _plan(model, "--recipe", "gptq-w3a16-g64", "--format", "onnx", "--no-time")
    assert any(reason.startswith("onnx: ") and "3" in reason for reason in chosen["reasons"])
    assert chosen["formats"]["compressed-tensors"]["supported"]
    assert _plan(model, "--recipe", "gptq-w3a16-g64", "--no-time")["possible"]
    refused(call("plan", model, "--recipe", "gptq-w4a16-g32", "--format", "onyx"), 2, "onyx", "onnx")
    outcome = call("plan", model, "--recipe", "gptq-w3a16-g64", "--format", "onnx", "--no-time")
    assert outcome.err.startswith(f"error: it cannot work: {chosen['reasons'][0]}")
    assert outcome.err.count("error: ") == 1


def test_memory_of_this_machine_counts_unless_another_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_export.preflight.available_bytes", lambda: 64 << 20)
    here = _plan(model, "--recipe", "gptq-w4a16-g32", "--no-time")
    assert "64 MiB are free here" in here["reasons"][0]
    assert _plan(model, "--recipe", "gptq-w4a16-g32", "--no-time", "--memory", "8GiB")["possible"]
    assert "64 MiB are free here" in here["formats"]["tensorrt"]["reason"]
    larger = _plan(model, "--recipe", "gptq-w4a16-g32", "--no-time", "--memory", "8GiB", "--format", "tensorrt")
    assert larger["possible"]
    monkeypatch.setattr("qwen3_export.preflight.available_bytes", lambda: None)
    assert _plan(model, "--recipe", "gptq-w4a16-g32", "--no-time")["possible"]


def test_memory_counts_for_a_plan_that_is_built_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is asked for: a plan takes more to build than this model takes to quantize."""
    asked = (model, "--recipe", "rtn-w4a16-g32", "--no-time", "--memory")
    need = _plan(*asked, "1GiB", "--format", "tensorrt")
    build = need["formats"]["tensorrt"]["build"]["peak_rss_bytes"]
    assert need["possible"]
    assert need["peak_rss_bytes"] == build
    below = f"{build - 1}"
    (reason,) = _plan(*asked, below, "--format", "tensorrt")["reasons"]
    assert reason.startswith("tensorrt: building it takes about ")
    assert " of memory, --memory allows " in reason
    other = _plan(*asked, below)
    assert other["possible"]
    assert not other["formats"]["tensorrt"]["supported"]
    assert not other["runtimes"]["tensorrt-rtx"]["supported"]

    monkeypatch.setattr("qwen3_export.solve.quantize.run_blocks", None)
    command = ("tensorrt", model, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "out", "--memory", below)
    refused(call(*command), 2, "building the plan takes about", "--memory allows", "--onnx-only")
    assert names(tmp_path) == []


def test_nodes_share_the_blocks_and_not_the_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_export.preflight import timing

    monkeypatch.setattr(timing, "run_trial", fixed_trial)
    common = (model, "--recipe", "gptq-w4a16-g32", *SHORT)
    one, two, many = (_plan(*common, "--nodes", n) for n in (1, 2, 10_000))
    assert two["nodes"] == 2
    assert two["peak_rss_bytes"] == one["peak_rss_bytes"]
    alone = many["seconds"]
    assert alone == pytest.approx(timing._START_SECONDS, rel=0.01)
    assert two["seconds"] - alone == pytest.approx((one["seconds"] - alone) / 2, rel=0.01)
    refused(call("plan", *common, "--nodes", "0"), 2, "--nodes")


def test_every_tensor_that_does_not_divide_is_counted(tmp_path: Path) -> None:
    odd = write_text_model(tmp_path / "odd", hidden_size=96)
    found = _plan(odd, "--recipe", "rtn-w4a16-g128", "--no-time")
    assert not found["possible"]
    assert "self_attn.q_proj and " in found["reasons"][0]
    assert "96 inputs are not divisible by group_size 128" in found["reasons"][0]
    assert not any(item["supported"] for item in found["formats"].values())


def test_runtimes_have_rules_of_their_own(model: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(
        "name: mixed\nmethod: rtn\nrules:\n"
        "  - {match: '*.q_proj', scheme: {num_bits: 8, strategy: group, group_size: 32}}\n"
        "  - {match: '*', scheme: {num_bits: 4, group_size: 32}}\n"
    )
    found = _plan(model, "--recipe", mixed, "--no-time")
    assert "different schemes" in found["runtimes"]["vllm"]["reason"]
    assert found["runtimes"]["onnxruntime"]["supported"]
    zeros = _plan(model, "--recipe", "gptq-w4a16-g32-asym", "--no-time")
    assert "zero points" in zeros["runtimes"]["tensorrt-rtx"]["reason"]
    assert [item["count"] for item in found["tensors"]] == [2, 12]
    floats = _plan(model, "--recipe", "fp8-dynamic", "--no-time")
    assert floats["runtimes"]["vllm"]["supported"]
    assert not floats["runtimes"]["llama.cpp"]["supported"]


def test_plan_of_a_quantized_source(made: dict[str, Path]) -> None:
    assert "quantized already" in _plan(made["quantized"], "--recipe", "rtn-w4a16-g32")["reasons"][0]


def test_trial_block_is_narrow_and_of_the_same_kind(tmp_path: Path) -> None:
    wide = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    sparse = write_checkpoint(tmp_path / "moe", tiny_moe_config(num_experts=16, num_experts_per_tok=4))
    dense = open_source(str(write_checkpoint(tmp_path / "dense", tiny_config())))
    for checkpoint in (open_source(str(sparse)), dense):
        raw = narrowed({**checkpoint.raw_config, **wide}, checkpoint.config)
        assert raw["num_hidden_layers"] == 1
        assert raw["num_attention_heads"] % raw["num_key_value_heads"] == 0


def test_as_many_experts_of_the_trial_miss_the_floor_as_of_the_model(tmp_path: Path) -> None:
    """Experts get 4096 of 65,536 tokens each, and 512 of a trial's 4096: the floor is an eighth of the model's."""
    large, small = (
        open_source(str(write_checkpoint(tmp_path / name, tiny_moe_config(num_experts=experts, num_experts_per_tok=k))))
        for name, experts, k in (("large", 64, 4), ("small", 8, 1))
    )
    rows, trial = (Samples((np.zeros(512, np.int32),) * count, ("a",) * count) for count in (128, 8))
    recipe = replace(load_recipe("gptq-w4a16-g128"), experts=ExpertRule(min_tokens=4096))
    assert as_starved(recipe, large, rows, small, trial).experts.min_tokens == 512
    assert narrowed(large.raw_config, large.config)["num_experts_per_tok"] == 1
    assert as_starved(recipe, large, None, small, None) is recipe


@pytest.mark.parametrize(
    ("command", "option", "word"),
    [
        ("onnx", ("--flavor", "orrt"), "--flavor orrt"),
        ("onnx", ("--precision", "fp8"), "--precision fp8"),
        ("gguf", ("--type", "q8_0"), "--type q8_0"),
        ("tensorrt", ("--sm", "9.9"), "--sm 9.9"),
    ],
)
def test_target_is_checked_before_anything_is_quantized(
    command: str, option: tuple[str, str], word: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_export.solve.quantize.run_blocks", None)
    outcome = call(command, model, "--recipe", "gptq-w4a16-g32", *option, "--output", tmp_path / "out")
    refused(outcome, 2, word)
    assert names(tmp_path) == []


def test_recipe_that_the_target_cannot_hold(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_export.solve.quantize.run_blocks", None)
    for command, recipe in (("onnx", "gptq-w3a16-g64"), ("gguf", "fp8-dynamic"), ("tensorrt", "gptq-w4a16-g32-asym")):
        refused(call(command, model, "--recipe", recipe, "--output", tmp_path / "out"), 2, "cannot be exported")
    assert names(tmp_path) == []


def test_options_of_quantizing_need_a_recipe(model: Path, tmp_path: Path) -> None:
    for option in (("--samples", "4"), ("--sequence-length", "64"), ("--no-resume",), ("--memory", "1GiB")):
        refused(call("onnx", model, *option, "--output", tmp_path / "out"), 2, option[0].removeprefix("--no-"))
    refused(call("onnx", model, "--recipe", "rtn-w4a16-g32", "--device", "gpu", "--output", tmp_path / "out"), 2, "gpu")
    assert names(tmp_path) == []


def test_interrupted_export_goes_on_from_its_blocks(deep_model: Path, tmp_path: Path) -> None:
    command = ("gguf", deep_model, "--recipe", "gptq-w4a16-g32", *SHORT, "--threads", "1", "--output")
    output, state = tmp_path / "model.gguf", tmp_path / "model.gguf.quantized.partial"
    process = start(*command, output)
    wait_for(lambda: any(state.glob("*.partial/state/progress.json")), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert names(tmp_path) == [state.name]
    assert call(*command, output).code == 0
    assert names(tmp_path) == [output.name]
    assert call(*command, tmp_path / "at-once.gguf").code == 0
    assert hashes(output) == hashes(tmp_path / "at-once.gguf")


def test_an_export_that_was_stopped_after_quantizing_does_not_quantize_again(
    deep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("gguf", deep_model, "--recipe", "gptq-w4a16-g32", *SHORT, "--output")
    output, state = tmp_path / "model.gguf", tmp_path / "model.gguf.quantized.partial"

    def fail(error: Exception) -> Callable[..., None]:
        def write(*_: object, **__: object) -> None:
            raise error

        return write

    with monkeypatch.context() as broken:
        broken.setattr("qwen3_export.ship.gguf.write_shard", fail(ResourceError("the disk is full", "make room")))
        assert call(*command, output).code == 4
    assert names(tmp_path) == [state.name]
    with monkeypatch.context() as idle:
        idle.setattr("qwen3_export.solve.quantize.run_blocks", None)
        outcome = call(*command, output)
        assert outcome.code == 0
        assert "quantized already" in outcome.err
    assert names(tmp_path) == [output.name]
    assert call(*command, tmp_path / "at-once.gguf").code == 0
    assert hashes(output) == hashes(tmp_path / "at-once.gguf")
    # What is refused would be refused again.
    with monkeypatch.context() as refusing:
        refusing.setattr("qwen3_export.ship.gguf.write_shard", fail(InputError("no", "none")))
        assert call(*command, tmp_path / "refused.gguf").code == 2
    assert names(tmp_path) == ["at-once.gguf", output.name]
