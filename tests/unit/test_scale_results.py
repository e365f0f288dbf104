"""The program that measures large models: its slices are checkpoints of the exact widths, its table adds up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.scale.__main__ import ALL, keep
from benchmarks.scale.measure import measure
from benchmarks.scale.models import MODELS, make_slice
from benchmarks.scale.report import report
from qwen3_export.core.checkpoint import open_checkpoint


def _record(layers: int, wall: float) -> dict[str, object]:
    return {
        "model": "30B-A3B", "what": "gptq", "layers": layers, "rows": "128 × 512", "wall_s": wall, "cpu_s": 2 * wall,
        "peak_rss": 4_000_000_000, "scratch_bytes": 5_000_000_000, "disk_bytes": 1_000_000_000,
        "experts": {"min_tokens": 17, "below_floor": 60},
        "spent": {"experts": 0.6 * wall, "advance": 0.3 * wall},
        "plan": {"peak_rss_bytes": 5_000_000_000, "seconds": wall / 2},
    }  # fmt: skip


def test_a_slice_is_a_checkpoint_of_random_bf16_weights(tmp_path: Path) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 256, "moe_intermediate_size": 128}
    small = {**sizes, "num_experts": 4, "num_experts_per_tok": 2}
    source = open_checkpoint(make_slice(tmp_path / "slice", "30B-A3B", 2, **small))
    assert source.config.num_layers == 2
    weight = source.read("model.layers.1.mlp.experts.3.up_proj.weight")
    assert weight.shape == (128, 256)
    assert 0.015 < float(weight.astype(np.float32).std()) < 0.025
    first = source.read("model.layers.1.mlp.experts.2.up_proj.weight")
    assert first.tobytes() != weight.tobytes()


def test_every_model_is_measured_and_the_depth_is_on_a_line(tmp_path: Path) -> None:
    assert {item.model for item in ALL} == set(MODELS)
    text = report([_record(1, 100.0), _record(4, 340.0)])
    # 80 s a layer: 340 + 44 · 80 s at 48 layers.
    assert "| 80 | 160 | 4.00, 4.00 | 48 layers: 1.1 h |" in text
    assert "5.00 GB, 0.80" in text
    assert "17, 60 of 512" in text
    assert "| 2.00 | experts 204 (60%), advance 102 (30%), other 34 (10%) |" in text
    results = tmp_path / "results.json"
    for wall in (100.0, 90.0):
        keep(results, _record(1, wall))
    assert results.read_text().count('"model"') == 1
    assert "| 90 |" in results.with_suffix(".md").read_text()


def test_a_result_longer_than_a_pipe_is_read_and_has_the_time_of_each_kind_of_work(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 2}
    source = make_slice(tmp_path / "slice", "30B-A3B", 1, **sizes, num_key_value_heads=1)
    options = ["--recipe", "gptq-w4a16-g128", "--samples", "2", "--sequence-length", "32", "--threads", "1"]
    run = measure(["quantize", source, *options, "--output", tmp_path / "out"], 1)
    assert len(json.dumps(run.result)) > 1 << 16
    assert {"experts", "advance", "moments", "rows"} <= set(run.spent)
    assert 0 < sum(run.spent.values()) < run.wall_s
    assert run.cpu_s > 0
    assert run.peak_rss > 100 << 20
