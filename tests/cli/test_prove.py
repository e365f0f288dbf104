"""`reference`, `validate`, `bench` and their reports; `run` in every runtime."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import call, names, refused

TOKENS = ("--tokens", "512")


def _drift(artifact: Path, reference: object, *options: object) -> dict[str, Any]:
    result = call("validate", artifact, "--reference", reference, *options, "--json").json["results"][0]
    assert result.pop("seconds") > 0
    return result


@pytest.fixture(scope="module")
def direct(made: dict[str, Path], model: Path) -> dict[str, Any]:
    """The ONNX folder against the original itself."""
    return _drift(made["onnx"], model, *TOKENS)


def test_a_file_of_all_logits_is_as_good_as_the_original(
    direct: dict[str, Any], made: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "all.safetensors"
    assert call("reference", model, "--output", file, "--top-k", "0", *TOKENS).code == 0
    from_file = _drift(made["onnx"], file)
    assert from_file["kl_is_lower_bound"] is direct["kl_is_lower_bound"] is False
    assert from_file == direct


def test_a_file_of_top_tokens_gives_an_estimate_and_a_bound_and_says_so(
    direct: dict[str, Any], made: dict[str, Path]
) -> None:
    from_file = _drift(made["onnx"], made["reference"])
    assert (from_file["kl_is_lower_bound"], direct["kl_estimate"]) == (False, None)
    estimate = from_file["kl_estimate"]
    assert 0 < estimate["lower_bound"] <= direct["kl_mean"] + 1e-7
    assert from_file["kl_mean"] == pytest.approx(direct["kl_mean"], abs=4 * estimate["stderr"])
    for field in ("tokens", "top1_agreement", "generation", "reference_sha256"):
        assert from_file[field] == direct[field]
    assert from_file["ppl_reference"] == pytest.approx(direct["ppl_reference"], rel=1e-6)
    outcome = call("validate", made["onnx"], "--reference", made["reference"])
    assert f"≈ {from_file['kl_mean']:.5f}" in outcome.out
    assert "note: KL is estimated" in outcome.err


def test_more_top_tokens_give_a_tighter_bound(
    direct: dict[str, Any], made: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    bounds = []
    for count in (1, 16, 256, 8192):
        file = tmp_path / f"top-{count}.safetensors"
        assert call("reference", model, "--output", file, "--top-k", count, *TOKENS).code == 0
        found = _drift(made["onnx"], file)
        bounds.append((found["kl_estimate"] or {"lower_bound": found["kl_mean"]})["lower_bound"])
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[1] < bounds[2]
    assert bounds[-1] == pytest.approx(direct["kl_mean"], rel=1e-4)


def test_the_original_does_not_drift_from_itself(model: Path, tmp_path: Path) -> None:
    result = _drift(model, model, *TOKENS)
    assert result["kl_mean"] < 1e-9
    assert result["top1_agreement"] == 1
    assert result["generation"]["agreement"] == 1


def test_own_text(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.jsonl"
    first.write_text("The sea was calm and the boats came home early. " * 20)
    second.write_text(json.dumps({"text": "def add(a, b):\n    return a + b\n" * 20, "domain": "code"}) + "\n")
    file = tmp_path / "own.safetensors"
    written = call("reference", model, "--output", file, "--text", first, "--text", second, "--json").json
    assert written["domains"] == ["code", "first"]
    result = _drift(made["onnx"], file)
    assert set(result["domains"]) == {"code", "first"}
    assert result["tokens"] == written["positions"]
    live = _drift(made["onnx"], model, "--text", first, "--text", second)
    assert live["tokens"] == result["tokens"]
    command = ("bench", made["onnx"], "--text", first, "--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1")
    assert call(*command).code == 0


def test_windows_are_as_long_as_asked(model: Path, tmp_path: Path) -> None:
    short = call("reference", model, "--output", tmp_path / "a", "--window", "64", *TOKENS, "--json").json
    long = call("reference", model, "--output", tmp_path / "b", "--window", "512", *TOKENS, "--json").json
    assert short["rows"] > long["rows"]
    assert short["tokens"] / short["rows"] <= 64


def test_report_folder(made: dict[str, Path], tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = (
        "validate",
        made["onnx"],
        made["gguf"],
        "--reference",
        made["reference"],
        "--threads",
        "1",
        "--report",
        report,
    )
    outcome = call(*command, "--max-kl", "1", "--min-top1", "1", "--json")
    assert outcome.code == 1
    assert {"report.json", "report.md", "report.xml", "qwen3-export.json"} <= set(names(report))
    assert json.loads((report / "report.json").read_text()) == outcome.json
    text = (report / "report.md").read_text()
    assert "model-onnx" in text
    assert "model.gguf" in text
    assert "FAIL" in text
    suite = ElementTree.parse(report / "report.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("4", "2")
    assert [case.get("name") for case in suite.iter("testcase")] == ["max_kl", "min_top1"] * 2
    assert all("min_top1 is 0." in failure.get("message", "") for failure in suite.iter("failure"))
    refused(call(*command), 2, "report exists already")
    assert call(*command, "--force", "--max-kl", "1").code == 0
    assert ElementTree.parse(report / "report.xml").getroot().get("failures") == "0"


def test_bench_report(made: dict[str, Path], tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = ("bench", made["onnx"], "--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1", "--report", report)
    outcome = call(*command, "--json")
    assert json.loads((report / "report.json").read_text()) == outcome.json
    assert "decode tok/s" in (report / "report.md").read_text()


def test_gate_file_and_options(made: dict[str, Path], tmp_path: Path) -> None:
    as_yaml, as_json = tmp_path / "gate.yaml", tmp_path / "gate.json"
    as_yaml.write_text("max_kl: 0.5\nmax_bytes: 100000000\nmax_extra_loops: 8\n")
    as_json.write_text('{"min_top1": 1.0}')
    common = ("validate", made["onnx"], "--reference", made["reference"])
    passed = call(*common, "--gate", as_yaml, "--json")
    assert passed.code == 0
    checks = passed.json["results"][0]["gate"]["checks"]
    assert [check["name"] for check in checks] == ["max_kl", "max_bytes", "max_extra_loops"]
    assert call(*common, "--gate", as_json).code == 1
    overruled = call(*common, "--gate", as_yaml, "--max-kl", "0", "--max-ppl-ratio", "100", "--json")
    assert overruled.code == 1
    failed = [check["name"] for check in overruled.json["results"][0]["gate"]["checks"] if not check["passed"]]
    assert failed == ["max_kl"]


def test_one_failing_artifact_fails_the_run(made: dict[str, Path], model: Path) -> None:
    common = ("--reference", made["reference"], "--max-kl", "0.000001", "--json")
    outcome = call("validate", model, made["onnx"], *common)
    assert outcome.code == 1
    assert [result["gate"]["passed"] for result in outcome.json["results"]] == [True, False]


@pytest.mark.parametrize("kind", ["quantized", "onnx", "gguf"])
def test_run_answers_with_text(kind: str, made: dict[str, Path]) -> None:
    command = ("run", made[kind], "--prompt", "What is the sea?", "--max-new-tokens", "8")
    outcome = call(*command)
    assert outcome.code == 0
    assert outcome.out.strip()
    assert "8 tokens" in outcome.err
    with_json = call(*command, "--json").json
    assert with_json["text"].strip() == outcome.out.strip()
    assert with_json["text"] == call(*command, "--json").json["text"]


@pytest.mark.parametrize("kind", ["quantized", "onnx", "gguf"])
def test_thinking_changes_the_prompt(kind: str, made: dict[str, Path]) -> None:
    command = ("run", made[kind], "--prompt", "What is the sea?", "--max-new-tokens", "1", "--json")
    lengths = [call(*command, *more).json["prompt_tokens"] for more in ((), ("--thinking",), ("--no-thinking",))]
    assert lengths[0] == lengths[1] < lengths[2]
    assert call(*command, "--system", "Be brief.").json["prompt_tokens"] > lengths[0]


def test_greedy_text_is_the_same_in_torch_and_onnx(made: dict[str, Path], tmp_path: Path) -> None:
    exact = call("onnx", made["quantized"], "--output", tmp_path / "exact", "--accuracy-level", "0")
    assert exact.code == 0, exact.err
    for prompt in ("What is the sea?", "def main():", "你好"):
        options = ("--prompt", prompt, "--max-new-tokens", "24", "--json")
        artifacts = (made["quantized"], tmp_path / "exact", made["tensorrt"])
        texts = [call("run", artifact, *options).json["text"] for artifact in artifacts]
        assert texts[0] == texts[1]
        assert texts[2]


def test_sampling_is_seeded(made: dict[str, Path]) -> None:
    options = ("--prompt", "What is the sea?", "--max-new-tokens", "12", "--temperature", "1.5", "--json")
    texts = [call("run", made["onnx"], *options, "--seed", seed).json["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_stops_where_the_context_ends(made: dict[str, Path]) -> None:
    values = call("run", made["onnx"], "--prompt", "word " * 400, "--max-new-tokens", "1000", "--json").json
    assert values["prompt_tokens"] + values["new_tokens"] <= 512


def _report(folder: Path, artifact: Path, reference: Path, *options: object) -> Path:
    outcome = call("validate", artifact, "--reference", reference, "--threads", "1", "--report", folder, *options)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def reports(made: dict[str, Path], model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of the original in torch, of the quantized folder, and of the latter's GGUF file."""
    folder = tmp_path_factory.mktemp("reports")
    reference = folder / "long.safetensors"
    assert call("reference", model, "--output", reference, "--tokens", "2048", "--window", "128").code == 0
    paths = {"plain": model, "quantized": made["quantized"], "gguf": made["gguf"]}
    return {name: _report(folder / name, path, reference) for name, path in paths.items()}


def test_gate_against_a_baseline(reports: dict[str, Path], tmp_path: Path) -> None:
    same = call("gate", reports["quantized"], "--baseline", reports["quantized"] / "report.json", "--json")
    assert (same.code, same.json["verdict"], same.json["passed"]) == (0, "same", True)
    for item in same.json["pairs"]:
        assert {"artifact", "metric", "baseline", "value", "delta", "ci95", "verdict"} <= set(item)
    output = tmp_path / "gate"
    worse = call("gate", reports["quantized"], "--baseline", reports["plain"], "--report", output)
    assert worse.code == 1
    assert "verdict: worse" in worse.out
    suite = ElementTree.parse(output / "report.xml").getroot()
    assert "kl_mean" in [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert "**worse**" in (output / "report.md").read_text()
    assert json.loads((output / "report.json").read_text())["verdict"] == "worse"
    tolerance = tmp_path / "tolerance.yaml"
    tolerance.write_text("bytes: 1GB\n")
    command = ("gate", reports["plain"], "--baseline", reports["quantized"], "--tolerance", tolerance)
    better = call(*command, "--json")
    assert better.code == 0
    assert better.json["pairs"][0]["verdict"] == "better"


def test_gate_refuses_what_cannot_be_compared(reports: dict[str, Path], made: dict[str, Path], tmp_path: Path) -> None:
    refused(call("gate", reports["gguf"], "--baseline", reports["quantized"]), 2, "the runtime differs")
    other = _report(tmp_path / "other", made["quantized"], made["reference"])
    refused(call("gate", other, "--baseline", reports["quantized"]), 2, "the text differs")
    refused(call("gate", made["quantized"], "--baseline", reports["quantized"]), 2, "report.json", "hint")
    refused(call("gate", reports["gguf"], "--baseline", tmp_path / "none"), 2, "none: cannot be read", "hint")
    tolerance = tmp_path / "tolerance.yaml"
    tolerance.write_text("kl_mean: -3\n")
    command = ("gate", reports["gguf"], "--baseline", reports["gguf"], "--tolerance", tolerance)
    refused(call(*command), 2, "kl_mean: -3 is no tolerance")
    tolerance.write_text("kl_mean: 1000%\ntop1_agreement: 1\nppl_ratio: 1000\nbytes: 1GB\n")
    lenient = ("gate", reports["quantized"], "--baseline", reports["plain"], "--tolerance", tolerance)
    assert call(*lenient).code in (0, 1)


def test_compare(reports: dict[str, Path], tmp_path: Path) -> None:
    outcome = call("compare", *reports.values(), "--report", tmp_path / "compared", "--json")
    candidates = {item["name"]: item for item in outcome.json["candidates"]}
    assert len(candidates) == 3
    assert candidates["model.gguf"]["tokens_per_second"] is None
    page = (tmp_path / "compared" / "report.html").read_text()
    assert "Size × drift × speed" in page
    assert "model.gguf" in call("compare", *reports.values()).out


def test_limits_of_a_gate_file_are_measured_or_refused_first(made: dict[str, Path], tmp_path: Path) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text(
        "max_bytes: 90MB\ndomains: {math: {max_kl: 0.9}}\nmin_decode_tokens_per_second: 0.01\n"
        "thinking: {max_extra_loops: 8}\nno_thinking: {min_agreement: 0}\n"
    )
    common = ("validate", made["gguf"], "--reference", made["reference"], "--threads", "1", "--gate", gate, "--json")
    result = call(*common).json["results"][0]
    assert [item["passed"] for item in result["gate"]["checks"]] == [True] * 5
    assert result["decode"]["tokens_per_second_p50"] > 0.01
    bench = ("bench", made["gguf"], "--prompt-tokens", "16", "--new-tokens", "2", "--repeat", "1", "--threads", "1")
    outcome = call(*bench, "--gate", gate, "--json")
    assert "note: 4 limits" in outcome.err
    assert [item["name"] for item in outcome.json["results"][0]["gate"]["checks"]] == ["min_decode_tokens_per_second"]
    gate.write_text("min_decode_tokens_per_second: 1e9\n")
    failed = call(*bench, "--gate", gate)
    assert failed.code == 1
    assert "min_decode_tokens_per_second is " in failed.out
    gate.write_text("domains: {law: {max_kl: 1}}\n")
    refused(call(*common[:-1]), 2, "no domain 'law'")
    gate.write_text("max_kl: 1\n")
    refused(call(*bench, "--gate", gate), 2, "no limit on latency")
    for option, value in (("--min-top1", "92"), ("--max-kl", "-1"), ("--max-bytes", "big"), ("--on", "median")):
        refused(call("validate", made["gguf"], "--reference", made["reference"], option, value), 2)


def test_the_upper_end_of_the_interval_can_be_asked_for(reports: dict[str, Path], made: dict[str, Path]) -> None:
    drift = _drift(made["gguf"], made["reference"], "--threads", "1")
    between = (drift["kl_mean"] + drift["kl_ci95"][1]) / 2
    common = ("validate", made["gguf"], "--reference", made["reference"], "--threads", "1", "--max-kl", between)
    lax, hard = call(*common), call(*common, "--on", "upper")
    assert (lax.code, hard.code) == (0, 1)
    assert "passed, but max_kl is inconclusive at" in lax.out
    assert "would decide it" in hard.out
