"""Runs whose disk is full: they go on when there is room again, and estimate what they need."""

from __future__ import annotations

import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.imatrix import Imatrix, ImatrixEntry
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.solve.preflight import artifact_bytes
from tests.cli.deep_runs import LAYERS, OPTIONS, start_run
from tests.cli.helpers import call, fill, finish, finished_blocks, hashes, names, refused, wait_for
from tests.cli.test_outputs import WRITERS

SMALL = ("--samples", "2", "--sequence-length", "16")


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


EXPORTS = {
    "onnx": (("onnx",), ""),
    "gguf": (("gguf", "--type", "q8_0"), ".gguf"),
    "tensorrt": (("tensorrt", "--onnx-only"), ""),
}


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("recipe", [(), ("--recipe", "rtn-w4a16-g32")], ids=["", "recipe"])
def test_exports_look_for_room_before_the_start(
    kind: str, recipe: tuple[str, ...], deep_model: Path, disk: Callable[..., Path]
) -> None:
    """With a recipe the room is that of the quantized copy and of what is exported from it."""
    (name, *options), suffix = EXPORTS[kind]
    options = [] if recipe and kind == "gguf" else options
    command = (name, deep_model, *options, *recipe)
    probe = disk(64 << 10)
    refusal = call(*command, "--output", probe / f"out{suffix}")
    refused(refusal, 4, "are needed", "free some room, or write --output to another disk")
    assert names(probe) == []
    needed = float(refusal.err.partition("about ")[2].split()[0])
    place = disk(int((needed * 1.05 + 0.7) * (1 << 20)) // 4096 * 4096)
    assert call(*command, "--output", place / f"out{suffix}").code == 0


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


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What `ulimit -f` sets, for this process."""
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, most))


# The files of these are all smaller than the largest size tried.
SMALL_FILES = ("calibrate", "search", "reference")
LIMITS = [
    (kind, size)
    for kind in [*WRITERS, "calibrate", "search"]
    for size in (100, 10_000, 300_000)
    if size < 300_000 or kind not in SMALL_FILES
]


@pytest.mark.parametrize(("kind", "size"), LIMITS)
def test_a_limit_on_the_size_of_files_is_named(
    kind: str, size: int, made: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    """It is met in files of every sort: spilled activations, tensors, graphs, texts."""
    others = {
        "calibrate": ("calibrate", model, *SMALL),
        "search": ("recipes", "search", model, "--target-bpw", "5", "--samples", "2", "--sequence-length", "32"),
    }
    command = others[kind] if kind in others else WRITERS[kind](made, model)
    with largest_file(size):
        outcome = call(*command, "--output", tmp_path / "out")
    refused(outcome, 4, "a file may not get as large: ", "hint: raise the limit (`ulimit -f unlimited`)")
    # gguf-py reads copies of the model's texts, which lie in the system's own folder.
    places = (tmp_path, tempfile.gettempdir()) if (kind, size) == ("gguf", 100) else (tmp_path,)
    assert any(f"get as large: {place}/" in outcome.err for place in places), outcome.err
    assert not (tmp_path / "out").exists()


def test_an_importance_matrix_names_itself(tmp_path: Path) -> None:
    """Whatever folders of intermediate files are open around it."""
    entry = ImatrixEntry(np.ones((1, 256), np.float32), np.ones(1, np.float32))
    with largest_file(100), pytest.raises(OSError, match="File too large") as caught:
        Imatrix({"blk.0.attn_q.weight": entry}).write(tmp_path / "imatrix.gguf")
    assert caught.value.filename == str(tmp_path / "imatrix.gguf")
