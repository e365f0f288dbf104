"""How `plan` makes a model's seconds of those of a trial."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.preflight.timing import Rates, block_seconds, kinds_of, probed, solving_of
from qwen3_export.preflight.trial import Trial, random_samples, run_trial, write_block
from qwen3_export.preflight.work import Solving, block_work, rows_work
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.text.samples import Samples
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint

SOLVING = Solving(original=1.0, products=10.0, fold=True)


def samples(count: int, length: int = 64) -> Samples:
    return Samples((np.zeros(length, np.int32),) * count, ("a",) * count)


@pytest.fixture
def dense(tmp_path: Path) -> Qwen3Config:
    return open_source(str(write_checkpoint(tmp_path / "dense", tiny_config()))).config


@pytest.fixture
def sparse(tmp_path: Path) -> Qwen3Config:
    config = tiny_moe_config(num_experts=4, num_experts_per_tok=2)
    return open_source(str(write_checkpoint(tmp_path / "sparse", config))).config


def test_passes_grow_with_the_samples_and_factors_do_not(dense: Qwen3Config) -> None:
    few, many = (block_work(dense, 0, samples(count), SOLVING) for count in (16, 64))
    assert many["advance"] == pytest.approx(4 * few["advance"])
    assert few["moments"] < many["moments"] < 4 * few["moments"]
    for kind in ("factors", "confirm", "shift", "drift", "fold"):
        assert many[kind] == few[kind] > 0


def test_only_the_shift_takes_what_the_original_is_needed_for(dense: Qwen3Config) -> None:
    alone, beside = (block_work(dense, 0, samples(16), Solving(share, 4.0)) for share in (0.0, 1.0))
    assert not {"confirm", "shift", "drift"} & set(alone)
    assert beside["advance"] == 2 * alone["advance"]
    assert beside["factors"] > alone["factors"]


def test_every_expert_counts_and_starved_ones_get_no_shift(sparse: Qwen3Config) -> None:
    none, half, all_ = (
        block_work(sparse, 0, samples(16), Solving(1.0, 4.0, starved=share)) for share in (0.0, 0.5, 1.0)
    )
    assert none["experts/shift"] == 2 * half["experts/shift"] > 0 == all_["experts/shift"]
    weights = sum(rows * width for name, (rows, width) in sparse.linear_shapes(0).items() if ".experts." in name)
    assert rows_work(sparse, 0, SOLVING)["experts/rows"][0] == weights


def test_recipes_say_how_many_products_a_row_takes() -> None:
    plain, better = (solving_of(load_recipe(name), 0.0) for name in ("gptq-plain-w4a16-g128", "gptq-w4a16-g128"))
    assert plain.products < better.products
    assert solving_of(load_recipe("awq-w4a16-g128"), 0.0).original == 0
    assert solving_of(load_recipe("edge-w4"), 0.0).outputs == 64


def test_seconds_of_a_trial_are_counted_once(sparse: Qwen3Config) -> None:
    seconds = {"advance": 3.0, "experts": 4.0, "experts/rows": 5.0, "experts/moments": 1.0, "experts/rows/x": 2.0}
    found = kinds_of(Trial(sparse, samples(16), seconds, 8.0), threads=2)
    assert found == {"advance": 3.0, "experts/rows": 5.0, "experts/moments": 1.0, "experts/rest": 2.0, "rest": 1.0}


def test_the_same_block_takes_the_seconds_of_the_trial(dense: Qwen3Config, sparse: Qwen3Config) -> None:
    """Whatever the rates are: they only say how seconds grow."""
    for config, seconds in (
        (dense, {"advance": 3.0, "rows": 4.0, "moments": 1.0}),
        (sparse, {"advance": 3.0, "experts": 4.0, "experts/rows": 5.0, "experts/moments": 1.0, "rows": 0.5}),
    ):
        trial = Trial(config, samples(16), seconds, 9.0)
        for rates in (Rates(0.0, 0.0, 2), Rates(1e-8, 1e-8, 2)):
            assert block_seconds(trial, config, 0, samples(16), SOLVING, rates) == pytest.approx(9.0)
    plain = Trial(dense, None, {}, 2.0)
    assert block_seconds(plain, dense, 0, None, Solving(), Rates(0.0, 0.0)) == pytest.approx(2.0)


def test_a_trial_knows_the_seconds_of_each_kind_of_work(tmp_path: Path) -> None:
    """A real one, of a mixture: nothing is left out, and no more is counted than the clock says."""
    recipe, settings = load_recipe("gptq-w4a16-g32"), QuantizeSettings(threads=2)
    block = write_block(tmp_path / "block", tiny_moe_config(num_hidden_layers=1, moe_intermediate_size=64))
    trial = run_trial(block, recipe, random_samples(block, 16), settings, tmp_path / "trial")
    kinds = kinds_of(trial, 2)
    assert {"advance", "moments", "rows", "shift", "experts/rows", "experts/rest", "rest"} <= set(kinds)
    assert all(seconds >= 0 for seconds in kinds.values())
    top = {kind: seconds for kind, seconds in trial.seconds.items() if "/" not in kind}
    assert 0 < sum(top.values()) <= trial.total
    rates = probed(settings)
    assert 0 < rates.product < rates.factor * 10
    assert rates.threads == 2
