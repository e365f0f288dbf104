"""Limits on the calibration tokens of experts, and the coverage that they are checked against."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.coverage import UNKNOWN, read_coverage
from qwen3_export.core.manifest import write_manifest
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import InputError
from qwen3_export.prove.gate import check, explain
from qwen3_export.prove.limits import refuse_without_experts
from qwen3_export.prove.report import junit
from qwen3_export.prove.validate import open_reference, validate
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint
from tests.unit.prove.reports import RESULT


@pytest.mark.parametrize("name", ["min_expert_tokens", "max_experts_below_floor"])
def test_a_limit_on_experts_of_which_nothing_is_known_fails_and_says_so(name: str) -> None:
    verdict = check({**RESULT, "experts": UNKNOWN}, {name: 0.0})
    assert verdict["passed"] is False
    assert explain(verdict["checks"][0]).startswith(f"{name}: the artifact does not say")
    suite = ElementTree.fromstring(junit({"results": [{**RESULT, "gate": verdict}]}))
    failure = suite[0].find("failure")
    assert failure is not None
    assert "does not say how many tokens" in str(failure.get("message"))


@pytest.mark.parametrize("name", ["min_expert_tokens", "max_experts_below_floor"])
def test_a_limit_on_experts_is_refused_for_a_dense_model(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: a/model is a dense model"):
        refuse_without_experts({name: 1.0, "max_kl": 1.0}, Path("a/model"), None)
    refuse_without_experts({"max_kl": 1.0}, Path("a/model"), None)
    refuse_without_experts({name: 1.0}, Path("a/model"), UNKNOWN)


def test_coverage_is_read_from_the_manifest_or_else_the_configuration_says_if_there_are_experts(tmp_path: Path) -> None:
    def folder(name: str, config: dict[str, Any] | None, **manifest: Any) -> Path:
        path = tmp_path / name
        path.mkdir()
        if config:
            (path / "config.json").write_text(json.dumps(config))
        if manifest:
            write_manifest(path, "test", manifest)
        return path

    summary = {"min_tokens": 3, "below_floor": 1, "floor": 4, "fallback": "rtn"}
    counted = {**summary, "tokens_per_expert": {"model.layers.0": [3, 9]}}
    assert read_coverage(folder("quantized", tiny_moe_config(), experts=counted)) == summary
    assert read_coverage(folder("exported", None, experts=summary)) == summary
    assert read_coverage(folder("dense", tiny_config(), experts=None)) is None
    assert read_coverage(folder("dense source", tiny_config())) is None
    assert read_coverage(folder("source", tiny_moe_config())) == UNKNOWN
    assert read_coverage(folder("all layers dense", tiny_moe_config(mlp_only_layers=[0, 1]))) is None
    assert read_coverage(folder("old export", None, flavor="ort")) == UNKNOWN
    assert read_coverage(folder("older", None, experts={"min_tokens": 3})) == {**UNKNOWN, "min_tokens": 3}


@pytest.mark.slow
def test_a_starved_export_fails_its_gate_in_its_own_runtime(tmp_path: Path, reference_folder: Path) -> None:
    """From the quantized folder and from the GGUF file, which carries the summary along."""
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "max_position_embeddings": 512,
    }
    source = write_checkpoint(tmp_path / "moe", tiny_moe_config(**sizes))
    for path in reference_folder.glob("*token*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    recipe = Recipe.from_dict(
        {"name": "test", "method": "gptq", "rules": [{"match": "*", "scheme": {"group_size": 32}}]}, "test"
    )
    folder, file = tmp_path / "quantized", tmp_path / "model.gguf"
    experts = quantize(open_checkpoint(source), recipe, folder, QuantizeSettings(samples=2, sequence_length=64))[
        "experts"
    ]
    assert 0 < experts["min_tokens"] < experts["floor"] == 128
    export_gguf(open_checkpoint(folder), file)
    export_gguf(open_checkpoint(source), tmp_path / "plain.gguf", "bf16")
    reference = open_reference(str(source), tokens=64)
    limits = {"min_expert_tokens": 128.0, "max_experts_below_floor": 8.0}
    results = validate([folder, file], reference, limits)["results"]
    for result in results:
        assert result["experts"] == experts
        assert [item["passed"] for item in result["gate"]["checks"]] == [False, True]
    recorded = json.loads((folder / "qwen3-export.json").read_text())["tensors"]
    found = results[0]["rounding_errors"]
    assert found["q_proj"]["1"] == recorded["model.layers.1.self_attn.q_proj"]["error"]
    experts = [recorded[f"model.layers.0.mlp.experts.{i}.up_proj"]["error"] for i in range(4)]
    assert found["up_proj"]["0"] == pytest.approx(sum(experts) / 4)
    assert results[1]["rounding_errors"] is None
    unknown = validate([source, tmp_path / "plain.gguf"], reference, limits)["results"]
    assert all(item["value"] is None and not item["passed"] for one in unknown for item in one["gate"]["checks"])
    with pytest.raises(InputError, match="is a dense model"):
        validate([reference_folder], open_reference("reference-model", tokens=64), limits)
