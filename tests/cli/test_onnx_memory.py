"""What an accuracy level and a small cache cost is measured in memory that is flat from layer to layer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.support import round_to_nearest
from tests.conftest import copy_tokenizer, tiny_config, write_checkpoint

# Ten million weights per layer: 5 MB as codes, which ONNX Runtime holds twice while it packs them.
WIDE = {"hidden_size": 512, "intermediate_size": 6144, "head_dim": 64, "vocab_size": 8192}
# Prints by how much the most memory that was resident grows. Parts are so small that no layers share one.
WATCH = """
import re, sys
from pathlib import Path
from qwen3_export.prove.cache import cache_scales
from qwen3_export.prove.rounding import level_cost
from qwen3_export.run import graph_parts

def most():
    return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def measure(folder):
    if sys.argv[1] == "scales":
        assert cache_scales(folder, 8)
    else:
        assert level_cost(folder)["added_kl"] is not None

graph_parts.PART_BYTES = 1 << 20
small, large = map(Path, sys.argv[2:])
measure(small)
before = most()
measure(large)
print(most() - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, reference_model: Checkpoint) -> list[Path]:
    """The same width with 2 and with 8 layers."""
    base = tmp_path_factory.mktemp("layers")
    for layers in (2, 8):
        source = write_checkpoint(base / f"{layers}", tiny_config(**WIDE, num_hidden_layers=layers))
        copy_tokenizer(reference_model.folder, source)
        rounded = round_to_nearest(source, base / f"{layers}-w4", ("*", QuantScheme(4, group_size=128)))
        export_onnx(rounded, base / f"{layers}-onnx")
    return [base / f"{layers}-onnx" for layers in (2, 8)]


@pytest.mark.parametrize("what", ["level", "scales"])
def test_measuring_takes_no_more_memory_for_more_layers(folders: list[Path], what: str) -> None:
    command = [sys.executable, "-c", WATCH, what, *map(str, folders)]
    # Freed memory goes back to the system at once, so that what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    # Six more layers hold 31 MB as codes, and as much again as they are packed for the kernels.
    assert int(done.stdout) < 15e6
