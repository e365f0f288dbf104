"""Runs over experts that few tokens reach: the same bytes, what is said about them, and what they cost."""

from __future__ import annotations

import gc
import itertools
import json
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.solve.blocks import forward
from qwen3_export.solve.calibration import experts as experts_module
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.unit.solve.experts.support import FLOOR, make_source, recipe
from tests.unit.solve.support import Interrupted, hashes


@pytest.mark.parametrize("fallback", ["share", "rtn"])
def test_neither_threads_nor_a_stop_change_a_byte(
    source: Path, settings: QuantizeSettings, tmp_path: Path, fallback: str
) -> None:
    checkpoint, chosen = open_checkpoint(source), recipe("gptq", fallback, target_shift=True, fold="awq")
    quantize(checkpoint, chosen, tmp_path / "wanted", settings)
    quantize(checkpoint, chosen, tmp_path / "one", replace(settings, threads=1))
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, chosen, tmp_path / "stopped", settings, Interrupted(1))
    assert quantize(checkpoint, chosen, tmp_path / "stopped", settings)["resumed_blocks"] == 1
    wanted = hashes(tmp_path / "wanted")
    assert hashes(tmp_path / "one") == wanted
    assert hashes(tmp_path / "stopped") == wanted


def test_a_run_with_another_rule_is_another_run(source: Path, settings: QuantizeSettings, tmp_path: Path) -> None:
    rules = [recipe(), recipe(fallback="rtn"), recipe(token_floor=FLOOR + 1), recipe(token_floor=None)]
    assert len({rule.sha256 for rule in rules}) == len(rules)


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[str] = []
        self.warned: list[str] = []

    def log(self, text: str) -> None:
        self.logged.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def test_starved_experts_are_reported(run: Callable[..., tuple[Checkpoint, dict[str, Any]]]) -> None:
    told = Told()
    _, manifest = run(recipe(), progress=told)
    below = manifest["experts"]["below_floor"]
    assert [line for line in told.logged if line.startswith("experts:")] == [
        f"experts: 8, each saw 0 calibration tokens or more; {below} fewer than {FLOOR}"
    ]
    assert len(told.warned) == 1
    assert f"{below} of 8 experts saw fewer than {FLOOR} calibration tokens" in told.warned[0]
    enough, plain = Told(), Told()
    run(recipe(token_floor=0), progress=enough)
    run(recipe("rtn"), progress=plain)
    assert enough.warned == []
    assert not [text for text in plain.warned if "experts saw" in text]


def test_the_result_holds_the_summary_and_the_manifest_the_counts(
    source: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    result = quantize(open_checkpoint(source), recipe(), tmp_path / "out", settings)
    counts = read_manifest(tmp_path / "out")["experts"].pop("tokens_per_expert")
    summary = {key: value for key, value in read_manifest(tmp_path / "out")["experts"].items() if key in UNCOUNTED}
    assert result["experts"] == summary
    assert set(summary) == UNCOUNTED
    assert list(counts) == [block_name(0), block_name(1)]
    assert "experts" in json.loads((tmp_path / "out" / "qwen3-export.json").read_text())["recipe"]


UNCOUNTED = {"min_tokens", "below_floor", "floor", "fallback"}


def live_hessians(
    folder: Path, settings: QuantizeSettings, output: Path, chosen: Recipe, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """The most moments alive whenever new ones are collected, and how often that was.

    A pool's thread lets go of its last piece of work a moment after it has told that it is done: more than one for each
    thread are counted if they stay.
    """
    # Asking a weak reference makes a strong one for a moment, in which another thread may count it: none is asked.
    refs: list[weakref.ref] = []
    numbers, alive = itertools.count(), set[int]()
    most, plain = [0], forward.collect_moments

    def spy(*arguments: Any) -> Any:
        deadline = time.monotonic() + 0.5
        while len(alive) > settings.threads and time.monotonic() < deadline:
            time.sleep(0.002)
        most[0] = max(most[0], len(alive))
        moments = plain(*arguments)
        number = next(numbers)
        alive.add(number)
        refs.append(weakref.ref(moments.hessian, lambda _: alive.discard(number)))
        return moments

    monkeypatch.setattr(forward, "collect_moments", spy)
    monkeypatch.setattr(experts_module, "collect_moments", spy)
    gc.disable()
    try:
        quantize(open_checkpoint(folder), chosen, output, settings)
    finally:
        gc.enable()
        monkeypatch.undo()
    return most[0], len(refs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("fallback", ["share", "rtn"])
def test_the_moments_of_one_expert_a_thread_are_in_memory_at_a_time(
    settings: QuantizeSettings, tmp_path: Path, reference_folder: Path, monkeypatch: pytest.MonkeyPatch,
    fallback: str, threads: int,
) -> None:  # fmt: skip
    most, settings = [], replace(settings, threads=threads)
    for experts in (4, 16):
        folder = make_source(tmp_path / f"moe-{experts}", reference_folder, num_experts=experts, num_hidden_layers=1)
        chosen = recipe("gptq", fallback, token_floor=10_000)
        found, collected = live_hessians(folder, settings, tmp_path / f"out-{experts}", chosen, monkeypatch)
        assert collected > 3 * experts
        most.append(found)
    # Those of the rows that are not held out, or the layer's, when an expert's own are collected.
    assert max(most) <= threads
    assert most[0] >= 1
