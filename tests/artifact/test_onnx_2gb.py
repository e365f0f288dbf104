"""Data beyond two gigabytes, where 32-bit offsets end: written, found by ONNX Runtime, and computed with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.qwen3 import parse_config
from tests.artifact.support import load_graph, logits, random_ids
from tests.conftest import random_tensors, tiny_moe_config, write_checkpoint
from tests.reference.models import TOLERANCE, load_theirs, relative_error, their_logits

SIDE, ALL = 1024, 384
# Experts that tokens go to. The down matrices of the last two lie beyond 2^31 bytes, as does what follows them.
LIVE = (0, 200, 300, ALL - 1)
LIMIT = 1 << 31
CONFIG = tiny_moe_config(hidden_size=SIDE, moe_intermediate_size=SIDE, num_hidden_layers=1, num_experts=ALL)
IDS = random_ids(24)
# Exports in a process of its own; prints the most memory that was resident, in bytes.
EXPORT = """
import re, sys
from pathlib import Path
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.ship.onnx import export_onnx

export_onnx(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), accuracy_level=0)
print(int(re.search("VmHWM:\\\\s+(\\\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def few_experts() -> dict[str, NDArray]:
    """Four experts; of each pair a token goes to the one whose score is positive, since the other's is its negative."""
    tensors = random_tensors(parse_config(CONFIG | {"num_experts": len(LIVE)}, "test"))
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[1], router[3] = -router[0], -router[2]
    return tensors


def write_sparse(folder: Path, few: dict[str, NDArray]) -> Path:
    """The same model with all experts: those that no token goes to are zeros, which take no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    places, end = dict[str, tuple[int, NDArray | None]](), 0
    header = {}
    for name, shape in parse_config(CONFIG, "test").tensor_shapes().items():
        array = few.get(name)
        if name.endswith("mlp.gate.weight"):
            array = np.zeros((ALL, SIDE), ml_dtypes.bfloat16)
            array[list(LIVE)] = few[name]
        elif ".experts." in name:
            head, number, tail = name.partition(".experts.")[0], *name.partition(".experts.")[2].split(".", 1)
            live = int(number) in LIVE
            array = few[f"{head}.experts.{LIVE.index(int(number))}.{tail}"] if live else None
        places[name], begin, end = (end, array), end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin, array in places.values():
            if array is not None:
                file.seek(8 + len(text) + begin)
                file.write(np.ascontiguousarray(array).tobytes())
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not stay on the disk after the test."""
    if shutil.disk_usage(tmp_path).free < 2 * LIMIT:
        pytest.skip("4 GB of disk are needed")
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


def test_data_beyond_two_gigabytes(room: Path) -> None:
    few = few_experts()
    source, output = write_sparse(room / "source", few), room / "onnx"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(source), str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Far less than the file.
    assert int(done.stdout) < 300e6
    assert (output / "model.onnx.data").stat().st_size > LIMIT
    places = {
        tensor.name: {item.key: int(item.value) for item in tensor.external_data if item.key != "location"}
        for tensor in load_graph(output).graph.initializer
    }
    down = places["layer.0.experts.down_proj.weight"]
    assert down["offset"] < LIMIT < down["offset"] + 300 * 2 * SIDE * SIDE
    assert [name for name, place in places.items() if place.get("offset", 0) > LIMIT]
    model = load_theirs(write_checkpoint(room / "few", CONFIG | {"num_experts": len(LIVE)}, few))
    (found,) = logits(output, [IDS])
    assert relative_error(found, their_logits(model, IDS)) < TOLERANCE
