"""Memory that was measured: flat from layer to layer, and within `--memory`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.units import parse_size
from tests.cli.helpers import finish, start
from tests.conftest import copy_tokenizer, tiny_config, tiny_moe_config, write_checkpoint

# Two million weights per layer: 4 MB in bf16. And eleven million, for a recipe that is quick: 22 MB.
SMALL = {"hidden_size": 512, "intermediate_size": 768, "head_dim": 128}
LARGE = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
# Prints the memory of the process after every block, `[in use, most that was resident so far]`, from within. What is
# in use is what malloc has handed out: how much it keeps in fragments differs from run to run by megabytes.
WATCH = """
import ctypes, gc, json, re, sys
from contextlib import contextmanager
from pathlib import Path
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import open_source
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize

found = []

class Heap(ctypes.Structure):
    # glibc's mallinfo2: `uordblks` are bytes in use in arenas, `hblkhd` those in mappings of their own.
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap

class Watch(Progress):
    @contextmanager
    def bar(self, label, total):
        def tick():
            gc.collect()
            most = re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
            found.append([heap().uordblks + heap().hblkhd, int(most[1]) * 1024])
        yield tick if label.startswith("quantize") else lambda: None

source, recipe, output, samples = sys.argv[1:]
settings = QuantizeSettings(samples=int(samples), sequence_length=32, threads=1)
quantize(open_source(source), load_recipe(recipe), Path(output), settings, Watch())
print(json.dumps(found))
"""


def model(folder: Path, sizes: dict[str, int], layers: int, reference: Checkpoint) -> Path:
    write_checkpoint(folder, tiny_config(**sizes, vocab_size=8192, num_hidden_layers=layers))
    copy_tokenizer(reference.folder, folder)
    return folder


def watched(source: Path, recipe: str, output: Path, samples: int = 8) -> list[list[int]]:
    command = [sys.executable, "-c", WATCH, str(source), recipe, str(output), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values: list[list[int]] = json.loads(done.stdout)
    return values


def test_rounding_takes_no_more_memory_for_more_layers(tmp_path: Path, reference_model: Checkpoint) -> None:
    source = model(tmp_path / "model", LARGE, 12, reference_model)
    most = [most for _, most in watched(source, "rtn-w4a16-g128", tmp_path / "out")]
    assert len(most) == 12
    # One block is written while the next is solved: it takes some blocks until the worst moment has been.
    # Eight layers hold 176 MB in bf16, and 88 MB as codes.
    assert most[11] - most[3] < 44e6


@pytest.mark.parametrize("recipe", ["gptq-w4a16-g128", "gptq-max-w4a16-g128"])
def test_solving_leaves_nothing_behind_of_a_layer(tmp_path: Path, reference_model: Checkpoint, recipe: str) -> None:
    source = model(tmp_path / "model", SMALL, 4, reference_model)
    left = [left for left, _ in watched(source, recipe, tmp_path / "out")]
    assert len(left) == 4
    # A line through all blocks but the first. A layer holds 4 MB in bf16, 8 MB in fp32, and 2 MB as codes.
    assert np.polyfit(range(3), left[1:], 1)[0] < 0.1e6


@pytest.mark.parametrize("recipe", ["gptq-plain-w4a16-g128", "gptq-w4a16-g128"])
def test_the_tokens_that_experts_happen_to_get_leave_nothing_behind(
    tmp_path: Path, reference_model: Checkpoint, recipe: str
) -> None:
    """Products of ever new shapes: what torch keeps for each of them took 20 to 100 MB for every layer."""
    sizes = {"vocab_size": 8192, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8}
    source = write_checkpoint(tmp_path / "model", tiny_moe_config(**sizes, num_hidden_layers=8))
    copy_tokenizer(reference_model.folder, source)
    left = [left for left, _ in watched(source, recipe, tmp_path / "out", samples=64)]
    assert len(left) == 8
    assert left[7] - left[3] < 3e6


def test_a_run_stays_within_its_memory(tmp_path: Path, reference_model: Checkpoint) -> None:
    source = model(tmp_path / "model", SMALL, 2, reference_model)
    given = ["quantize", str(source), "--recipe", "gptq-max-w4a16-g128", "--samples", "8", "--sequence-length", "32"]
    refused = finish(start(*given, "--output", str(tmp_path / "small"), "--memory", "500MiB"))
    assert refused.code == 2
    assert "--memory allows 500 MiB" in refused.err
    assert not (tmp_path / "small.partial").exists()
    told = refused.err.split("about ")[1].split(" of memory")[0]
    done = finish(start(*given, "--output", str(tmp_path / "out"), "--memory", told, "--json"))
    assert done.code == 0, done.err
    assert json.loads(done.out)["peak_rss_bytes"] <= (parse_size(told) or 0)
