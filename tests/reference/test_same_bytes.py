"""Rounding to nearest gives the same bytes on every machine and in every release: hashes that were stored once.

The shards of the quantized folder are compared, and the codes, scales and zero points that are read back from it.
Nothing here depends on the processor: no calibration text runs through the model. A change of these hashes changes
what users get, so it must be meant, and said in the changelog; `python -m tests.reference.test_same_bytes` prints them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from qwen3_export import quantize
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.tensor import QuantizedTensor

STORED = Path(__file__).with_suffix(".json")
RECIPES = ("rtn-w4a16-g128", "rtn-w4a16-g32", "rtn-w8a16", "fp8-dynamic", "fp8-block128")


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every shard, and of all numbers of the quantized matrices in the order of the model."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    checkpoint, numbers = open_checkpoint(folder), hashlib.sha256()
    for module in checkpoint.schemes:
        tensor = checkpoint.linear(module)
        assert isinstance(tensor, QuantizedTensor)
        for array in (tensor.codes, tensor.scales32, tensor.zeros):
            numbers.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return {**found, "codes, scales, zero points": numbers.hexdigest()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_are_those_that_were_stored(recipe: str, tmp_path: Path) -> None:
    quantize("reference-model", recipe, tmp_path / "out")
    assert hashes(tmp_path / "out") == json.loads(STORED.read_text())[recipe]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        made = {}
        for name in RECIPES:
            quantize("reference-model", name, Path(scratch) / name)
            made[name] = hashes(Path(scratch) / name)
        print(json.dumps(made, indent=1, sort_keys=True))
