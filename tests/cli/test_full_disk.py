"""Runs whose disk is full: they go on when there is room again, and estimate what they need."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.solve.preflight import artifact_bytes
from tests.cli.deep_runs import LAYERS, OPTIONS, start_run
from tests.cli.helpers import call, fill, finish, finished_blocks, hashes, names, refused, wait_for


def test_disk_that_fills_up_during_the_run(
    deep_model: Path, undisturbed: dict[str, str], disk: Callable[..., Path]
) -> None:
    place = disk(48 << 20)
    out = place / "out"
    process = start_run(deep_model, out)
    wait_for(lambda: finished_blocks(out), process)
    process.send_signal(signal.SIGSTOP)
    fill(place / "filler")
    process.send_signal(signal.SIGCONT)
    refused(finish(process), 4, "disk is full", "goes on where it stopped")
    done = finished_blocks(out)
    assert 0 < done < LAYERS
    assert names(place) == ["filler", "out.partial"]
    refused(call("quantize", deep_model, *OPTIONS, "--output", out), 4, "MiB are needed", "free some room")
    assert finished_blocks(out) == done
    (place / "filler").unlink()
    outcome = call("quantize", deep_model, *OPTIONS, "--output", out, "--json")
    assert outcome.json["resumed_blocks"] == done
    assert hashes(out) == undisturbed
    assert names(place) == ["out"]


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g32", "rtn-w4a16-g32"])
def test_estimate_of_the_disk_is_enough(recipe: str, deep_model: Path, disk: Callable[..., Path]) -> None:
    """What the preflight asks for suffices, however many blocks there are."""
    command = ("quantize", deep_model, "--recipe", recipe, *OPTIONS[2:], "--json")
    probe = disk(64 << 10)
    refusal = call(*command, "--output", probe / "out")
    refused(refusal, 4, "MiB are needed")
    needed = float(refusal.err.partition("about ")[2].split()[0])
    place = disk(int((needed + 0.1) * (1 << 20)) // 4096 * 4096)
    assert call(*command, "--output", place / "out").code == 0


def test_disk_that_is_full_at_the_end(deep_model: Path, disk: Callable[..., Path]) -> None:
    """The estimate knows tensors and sidecars, not the last kilobytes of JSON."""
    recipe = "rtn-w4a16-g32"
    needed = artifact_bytes(open_source(str(deep_model)), load_recipe(recipe))
    place = disk((needed // 4096 + 2) * 4096)
    command = ("quantize", deep_model, "--recipe", recipe, "--output", place / "out")
    refused(call(*command), 4, "disk is full")
    assert finished_blocks(place / "out") == LAYERS
    assert names(place) == ["out.partial"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    assert call(*command, "--json").json["resumed_blocks"] == LAYERS
    assert names(place) == ["out"]
