"""The estimate of memory, part by part, and beside peaks that were measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.scale.models import MODELS
from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.model.windows import RESIDENT_BYTES, WINDOW_BYTES
from qwen3_export.solve import memory, preflight
from qwen3_export.solve.chunk_sizes import TOKENS_AT_ONCE, WIDE
from qwen3_export.solve.memory import Memory, memory_parts
from qwen3_export.text.samples import Samples
from tests.conftest import tiny_config, tiny_moe_config

ROWS = Samples((np.zeros(512, np.int32),) * 128, ("a",) * 128)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "thread_count", lambda: 2)


def config(name: str, layers: int = 1, **changes: int) -> Qwen3Config:
    return parse_config({**MODELS[name].config, "num_hidden_layers": layers, **changes}, name)


def test_experts_count_as_codes_and_once_for_each_model_that_runs() -> None:
    few, many = (
        memory_parts(parse_config(tiny_moe_config(num_experts=count), "test"), ROWS, original=True) for count in (8, 64)
    )
    weights = 56 * 3 * 64 * 48
    assert many.block - few.block == weights
    assert many.running - few.running == 2 * 2 * weights
    assert (many.linear, many.expert, many.routed) == (few.linear, few.expert, few.routed)
    lent = memory_parts(parse_config(tiny_moe_config(), "test"), ROWS, token_floor=4096)
    assert lent.expert > memory_parts(parse_config(tiny_moe_config(), "test"), ROWS).expert


def test_a_layer_of_experts_larger_than_memory_is_kept_in_part() -> None:
    small, large = (memory_parts(config(name), ROWS, original=True) for name in ("30B-A3B", "Coder-480B-A35B"))
    assert small.running == 2 * 2 * 128 * 3 * 2048 * 768 <= 2 * RESIDENT_BYTES
    assert large.running == 2 * WINDOW_BYTES
    assert small.peak < 12e9
    assert large.peak < 24e9


def test_moments_of_a_wide_linear_are_fewer() -> None:
    hidden = 1024
    for width, squares in ((WIDE, memory._SQUARES), (WIDE + 128, memory._SQUARES_WIDE)):
        sizes = {"hidden_size": hidden, "intermediate_size": width, "head_dim": 64, "num_attention_heads": 4}
        found = memory_parts(parse_config(tiny_config(**sizes), "test"), ROWS, original=True)
        rows = 4 * (squares * width**2 + 3 * hidden * width + 3 * TOKENS_AT_ONCE * width)
        assert found.linear == rows + 6 * hidden * width + 4 * 8 * 2 * 512 * width
    assert memory_parts(config("32B"), ROWS, original=True).peak < 22e9


def test_layers_do_not_count() -> None:
    for name in MODELS:
        assert memory_parts(config(name), ROWS, original=True) == memory_parts(config(name, 4), ROWS, original=True)


def test_without_torch_a_second_block_is_there_while_the_first_is_written() -> None:
    one, two, many = (
        memory_parts(config("30B-A3B", count), None, without_torch=True).peak
        for count in (1, 2, MODELS["30B-A3B"].layers)
    )
    weights = sum(map(math.prod, config("30B-A3B", 1).linear_shapes(0).values()))
    assert two == many == one + weights


def test_a_small_table_is_one_piece() -> None:
    """The work on it grows with its words, until they fill a piece of fixed size."""
    sizes = (1024, 8192, 1 << 17, 1 << 18)
    found = [
        memory_parts(parse_config(tiny_config(hidden_size=256, vocab_size=words), "test"), ROWS, outer=True).outer
        for words in sizes
    ]
    whole, in_pieces = (3 + 4 * 6) * 256, 3 * 256
    assert found[1] - found[0] == whole * (sizes[1] - sizes[0])
    assert found[3] - found[2] == in_pieces * (sizes[3] - sizes[2])


def test_the_estimate_for_a_small_table_is_near_what_was_measured() -> None:
    """`gguf-q4_k_m` on the embedded model, with its loops compiled on the way; 0.584 GB in a second run."""
    rows = Samples((np.zeros(128, np.int32),) * 16, ("a",) * 16)
    predicted = memory_parts(
        open_source("reference-model").config, rows, original=True, token_floor=4096, fisher_samples=16, outer=True
    ).peak
    assert predicted == pytest.approx(0.77e9, rel=0.15)


def test_the_peak_is_the_largest_moment() -> None:
    assert Memory(1, 10, 100, 20, 30, 5, 7, 8).peak == 1 + 10 + 130
    assert Memory(1, 10, 0, 20, 0, 0, 7, 8).peak == 31
    assert Memory(1, 10, 0, 20, 0, 0, 700, 8).peak == 701


# The shape of the model in this package.
EMBEDDED = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_files_of_activations_are_as_large_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fullest moment of `quantize` on the embedded model, 128 rows of 512 tokens, where products are of bf16."""
    monkeypatch.setattr(preflight, "_input_bytes", lambda: 2)
    source = open_source("reference-model")
    found = preflight.activation_bytes(source, load_recipe("gptq-w4a16-g128"), ROWS, original=True)
    assert found == pytest.approx(578.3e6, rel=0.05)
    monkeypatch.setattr(preflight, "_input_bytes", lambda: 4)
    assert preflight.activation_bytes(source, load_recipe("gptq-w4a16-g128"), ROWS, original=True) > found


# Peaks of `quantize` on slices of these shapes, 128 rows of 512 tokens, two threads: what the estimate is made from.
@pytest.mark.parametrize(
    ("name", "changes", "with_inputs", "measured"),
    [
        ("30B-A3B", {"num_experts": 16, "num_experts_per_tok": 1}, True, 1.98e9),
        ("8B", {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}, True, 1.33e9),
        ("8B", {"num_hidden_layers": 4}, False, 0.64e9),
        ("8B", {"num_hidden_layers": 1}, False, 0.525e9),
        ("32B", {"num_hidden_layers": 1}, False, 0.847e9),
        ("235B-A22B", {"num_hidden_layers": 1}, False, 2.90e9),
        ("8B", {**EMBEDDED, "vocab_size": 8192}, True, 0.553e9),
    ],
)
def test_the_estimate_is_near_what_was_measured(
    name: str, changes: dict[str, int], with_inputs: bool, measured: float
) -> None:
    rows = ROWS if with_inputs else None
    predicted = memory_parts(
        config(name, **changes), rows, original=with_inputs, token_floor=4096, without_torch=not with_inputs
    ).peak
    assert predicted == pytest.approx(measured, rel=0.15)
