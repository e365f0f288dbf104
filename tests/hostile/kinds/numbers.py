"""Tensors of NaN, infinite, huge, tiny or equal numbers; successful outputs must be finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.tensorfile import TensorFile, write_tensors
from tests.hostile.damage import commands
from tests.hostile.trial import REFUSED, Place, Trial

_BAD = (float("nan"), float("inf"), float("-inf"))
_ODD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeros": np.zeros_like,
    "tiny": lambda array: (array.astype(np.float32) * 1e-7).astype(array.dtype),
    "subnormal": lambda array: (array.astype(np.float32) * 1e-39).astype(array.dtype),
    "large": lambda array: (array.astype(np.float32) * 1e4).astype(array.dtype),
    "huge": lambda array: (array.astype(np.float32) * 1e37).astype(array.dtype),
    "constant": lambda array: np.full_like(array, 0.5),
    "one outlier": lambda array: _put(array, 3e4),
}


def make(random: Random, place: Place) -> Trial:
    """A 16-bit checkpoint with one tensor changed."""
    folder = place.copy(random.choice(("model", "moe")))
    path = next(folder.glob("*.safetensors"))
    file = TensorFile(path)
    tensors = {name: file.read(name) for name in file.entries}
    name = random.choice(sorted(tensors))
    bad = random.random() < 0.6
    value, kind = random.choice(_BAD), random.choice(sorted(_ODD))
    tensors[name] = _put(tensors[name], value, random.random()) if bad else _ODD[kind](tensors[name])
    write_tensors(path, tensors.items())
    command, outputs = commands(random, folder, place.out)
    what = f"{name}: {value if bad else kind}"
    if not bad:
        return Trial(what, command, outputs=outputs, check=lambda: _check_finite(place.out))
    # A command that reads no weights cannot notice.
    return Trial(what, command, frozenset({0, 2}) if command[0] == "inspect" else REFUSED, outputs=outputs)


def _put(array: np.ndarray, value: float, where: float = 0.5) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[int(where * changed.size)] = value
    return changed


def _check_finite(output: Path) -> None:
    """Read every tensor of a quantized folder, which fails when one is not finite."""
    if (output / "model.safetensors.index.json").is_file():
        checkpoint = open_checkpoint(output)
        for name in checkpoint.files:
            checkpoint.read(name)
