"""`--json`: one object on stdout with every field of the contract, with values that can be true."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SHORT
from tests.cli.helpers import Outcome, call

EXPORT = ["output", "files", "bits_per_weight", "seconds", "peak_rss_bytes", "exact", "inexact_tensors"]
VALIDATE = [
    *("artifact", "runtime", "runtime_version", "device", "tokens", "kl_mean", "kl_ci95", "kl_p99", "top1_agreement"),
    *("ppl_reference", "ppl_artifact", "ppl_ratio", "domains", "generation", "bytes", "gate"),
]
BENCH = [
    *("artifact", "runtime", "device", "threads", "load_seconds", "prefill", "decode", "peak_rss_bytes"),
]
QUANTIZE = [
    *("output", "recipe", "source_sha256", "calibration_sha256", "seed", "tensors", "bits_per_weight", "bytes"),
    *("seconds", "peak_rss_bytes", "resumed_blocks", "layers", "experts"),
]


def _one_object(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    values = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(values, dict)
    return values


def _has(values: dict[str, Any], names: list[str]) -> None:
    assert not set(names) - set(values)


def test_quantize(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = _one_object(
        call("quantize", model, "--recipe", "gptq-w4a16-g32", *SHORT, "--seed", "3", "--output", out, "--json")
    )
    _has(values, QUANTIZE)
    assert values["output"] == str(out)
    assert (values["recipe"], values["seed"], values["tensors"]) == ("gptq-w4a16-g32", 3, 14)
    assert len(values["source_sha256"]) == len(values["calibration_sha256"]) == 64
    assert values["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert 4.5 < values["bits_per_weight"] < 16
    assert 1 << 25 < values["peak_rss_bytes"] < 1 << 34
    assert values["seconds"] > 0
    assert values["experts"] is None
    for layer in values["layers"]:
        _has(layer, ["name", "method", "scheme", "error", "tokens"])
        assert layer["method"] == "gptq"
        assert layer["tokens"] == 8 * 64
        assert 0 < layer["error"] < 0.1


def test_quantize_counts_what_experts_saw(tmp_path: Path) -> None:
    from tests.cli.helpers import write_text_model
    from tests.conftest import tiny_moe_config

    sizes = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    mixture = {k: v for k, v in tiny_moe_config().items() if "expert" in k or k in ("model_type", "architectures")}
    model = write_text_model(tmp_path / "moe", **{**mixture, **sizes, "norm_topk_prob": True})
    command = ("quantize", model, "--recipe", "gptq-w4a16-g32", *SHORT, "--output", tmp_path / "out", "--json")
    outcome = call(*command)
    values = _one_object(outcome)
    linears = [layer for layer in values["layers"] if ".experts." in layer["name"]]
    experts = [layer["tokens"] for layer in linears if layer["name"].endswith("up_proj")]
    floor = 2 * 128
    below = sum(count < floor for count in experts)
    assert values["experts"] == {"min_tokens": min(experts), "below_floor": below, "floor": floor, "fallback": "share"}
    assert f"warning: {below} of 8 experts saw fewer than {floor} calibration tokens" in outcome.err
    assert sum(layer["tokens"] for layer in linears) == 3 * sum(experts) == 2 * 3 * 2 * 8 * 64
    assert sum(layer.get("calibrated_on") == "shared" for layer in linears) == 3 * below


@pytest.mark.parametrize("kind", ["onnx", "gguf", "tensorrt"])
def test_export(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = _one_object(call(kind, made["quantized"], "--output", out, "--json"))
    _has(values, EXPORT)
    assert values["output"] == str(out)
    files = {item["path"]: item for item in values["files"]}
    wanted = {"out"} if out.is_file() else {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert set(files) == wanted
    for name, item in files.items():
        content = (out if out.is_file() else out / name).read_bytes()
        assert item["bytes"] == len(content)
        assert item["sha256"] == hashlib.sha256(content).hexdigest()
    assert values["exact"] is (not values["inexact_tensors"])
    for tensor in values["inexact_tensors"]:
        _has(tensor, ["name", "max_rel_error"])
    # A plan has kernels beside the few weights of this model.
    assert 4 < values["bits_per_weight"] < (80 if kind == "tensorrt" else 40)
    assert values["peak_rss_bytes"] > 1 << 25


def test_reference(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = _one_object(call("reference", model, "--output", out, "--tokens", "512", "--top-k", "8", "--json"))
    _has(values, ["output", "source_sha256", "tokens", "positions", "rows", "domains", "top_k", "bytes", "sha256"])
    assert values["positions"] == values["tokens"] - values["rows"]
    assert values["bytes"] == out.stat().st_size
    assert values["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert values["top_k"] == 8


def test_validate(made: dict[str, Path]) -> None:
    artifacts = [made["quantized"], made["onnx"], made["gguf"], made["tensorrt"]]
    values = _one_object(
        call(
            "validate",
            *artifacts,
            "--reference",
            made["reference"],
            "--max-kl",
            "1",
            "--min-top1",
            "0.1",
            "--threads",
            "1",
            "--json",
        )
    )
    assert values["passed"] is True
    assert [result["artifact"] for result in values["results"]] == [str(path) for path in artifacts]
    assert [result["runtime"].split()[0] for result in values["results"]] == [
        *("torch", "onnxruntime", "llama.cpp", "onnxruntime")
    ]
    for result in values["results"]:
        _has(result, VALIDATE)
        low, high = result["kl_ci95"]
        assert 0 < low <= result["kl_mean"] <= high
        assert result["kl_mean"] <= result["kl_p99"]
        assert 0 < result["top1_agreement"] <= 1
        assert result["ppl_ratio"] == pytest.approx(result["ppl_artifact"] / result["ppl_reference"])
        assert result["ppl_reference"] > 1
        _has(result["generation"], ["loops", "agreement"])
        assert sum(domain["tokens"] for domain in result["domains"].values()) == result["tokens"]
        assert result["gate"]["passed"] is True
        assert [check["name"] for check in result["gate"]["checks"]] == ["max_kl", "min_top1"]
        for check in result["gate"]["checks"]:
            _has(check, ["name", "value", "limit", "passed"])


def test_bench(made: dict[str, Path], model: Path) -> None:
    artifacts = [model, made["onnx"], made["gguf"]]
    options = ("--prompt-tokens", "16,64", "--new-tokens", "8", "--repeat", "3", "--threads", "1", "--json")
    values = _one_object(call("bench", *artifacts, *options))
    assert [result["artifact"] for result in values["results"]] == [str(path) for path in artifacts]
    for result in values["results"]:
        _has(result, BENCH)
        assert result["threads"] == 1
        assert 0 < result["load_seconds"] < 60
        assert [item["prompt_tokens"] for item in result["prefill"]] == [16, 64]
        for item in result["prefill"]:
            assert 0 < item["seconds_p50"] <= item["seconds_p95"]
            assert item["tokens_per_second"] == pytest.approx(item["prompt_tokens"] / item["seconds_p50"])
        decode = result["decode"]
        assert 0 < decode["per_token_seconds_p50"] <= decode["p95"] <= decode["p99"] < 60
        assert decode["tokens_per_second_p50"] == pytest.approx(1 / decode["per_token_seconds_p50"])
        assert 1 << 24 < result["peak_rss_bytes"] < 1 << 33


def test_inspect(model: Path, made: dict[str, Path]) -> None:
    plain, quantized = (_one_object(call("inspect", path, "--json")) for path in (model, made["quantized"]))
    assert (plain["architecture"], plain["layers"], plain["experts"]) == ("qwen3", 2, 0)
    assert plain["tied_head"] is True
    assert (plain["embedding"], plain["lm_head"]) == ("bfloat16", "tied to the embedding")
    assert plain["quantized"] == {}
    assert plain["bits_per_weight"] == 16
    assert plain["parameters"] == quantized["parameters"] == 8192 * 128 + 2 * 147_776 + 128
    assert list(quantized["quantized"].values()) == [14]
    assert 4.5 < quantized["bits_per_weight"] < 16


def test_recipes() -> None:
    listed = _one_object(call("recipes", "list", "--json"))["recipes"]
    assert {"rtn-w4a16-g128", "gptq-w4a16-g128", "gptq-w4a16-g32", "rtn-w8a16"} <= {item["name"] for item in listed}
    for item in listed:
        _has(item, ["name", "method", "description"])
        shown = _one_object(call("recipes", "show", item["name"], "--json"))
        assert (shown["name"], shown["method"]) == (item["name"], item["method"])


def test_shown_recipe_is_a_recipe(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(call("recipes", "show", "rtn-w4a16-g32").out)
    by_name = call("quantize", model, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "a", "--json").json
    by_file = call("quantize", model, "--recipe", recipe, "--output", tmp_path / "b", "--json").json
    assert by_name["layers"] == by_file["layers"]


def test_run(made: dict[str, Path]) -> None:
    values = _one_object(call("run", made["onnx"], "--prompt", "hello", "--max-new-tokens", "4", "--json"))
    _has(values, ["text", "prompt_tokens", "new_tokens", "tokens_per_second", "stop", "runtime"])
    assert values["new_tokens"] == 4
    assert values["stop"] == "length"


def test_demo_is_described_by_its_help() -> None:
    """The demo itself runs in tests/install, from an installed wheel."""
    assert "demo-output" in call("demo", "--help").out
