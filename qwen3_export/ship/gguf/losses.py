"""Tensors that their types do not hold, found before a file is begun.

Most of a tensor is lost where its numbers are too small for its type's scales, which are fp16, or too large for them.
Whether that is so is known for certain when its data are made, which is the work of the export. So one pass over the
numbers looks for tensors that are near these limits, and only their data are made beforehand. Weights that are rounded
are therefore read twice, of weights that are moved the scales alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.ship.gguf.encode import Encoder, in_order, pieces_of_rows
from qwen3_export.ship.gguf.write import Planned

# Numbers between the two are safe: of a weight that is rounded, and of a scale that is moved. A weight below the first
# may get a scale that is 0 in fp16: 2⁻²⁵ times the largest sub-scale and code (127 · 32). A scale is stored alone, or
# times the largest zero point.
_WEIGHTS, _SCALES = (2.0**-12, 65504.0), (2.0**-21, 65504.0 / 256)
_FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))


class _Power(NamedTuple):
    """Σ x² of some numbers, and how many they are."""

    whole: float
    numbers: int


def refuse_lost(encoder: Encoder, plan: Sequence[Planned], done: Callable[[], None]) -> None:
    """Raise UnsupportedError for the first tensor that its type does not hold.

    `done` is called after every tensor of the plan.
    """
    scales = _scale_names(encoder)
    for item in plan:
        for module in item.modules:
            if not _is_safe(encoder, module, item.type, scales.get(module, [])):
                trial = Encoder(encoder.checkpoint, encoder.types, encoder.importance, encoder.threads)
                for encoded in in_order(trial.tasks(module, item.type), encoder.threads):
                    trial.note(encoded.changes)
                trial.refuse_lost([module])
        done()


def _is_safe(encoder: Encoder, module: str, name: str, scales: Sequence[str]) -> bool:
    """Whether a matrix's numbers stay as they are, or are far from the limits."""
    checkpoint, scheme = encoder.checkpoint, encoder.checkpoint.schemes.get(module)
    if scheme is None:
        if encoder.keeps(module, name):
            return True
        tensor = f"{module}.weight"
        rows = (partial(checkpoint.rows, tensor, cut.start, cut.stop) for cut in encoder.cuts(module))
        return _far(in_order((partial(_power, read) for read in rows), encoder.threads), *_WEIGHTS)
    if encoder.rounds_again(module):
        weight = checkpoint.linear(module)
        assert isinstance(weight, QuantizedTensor)
        parts = (partial(dequantize, part) for part in pieces_of_rows(weight))
        return _far(in_order((partial(_power, make) for make in parts), encoder.threads), *_WEIGHTS)
    if scheme.ggml_type is not None or scheme.type == "float":
        return True
    return all(_far([_power(partial(checkpoint.read, scale))], *_SCALES) for scale in scales)


def _scale_names(encoder: Encoder) -> dict[str, list[str]]:
    """The stored scales of every matrix whose codes are moved."""
    found: dict[str, list[str]] = {}
    for name in encoder.checkpoint.files if encoder.checkpoint.schemes else ():
        module, _, last = name.rpartition(".")
        if module in encoder.checkpoint.schemes and last != "bias" and encoder.checkpoint.entry(name).dtype in _FLOATS:
            found.setdefault(module, []).append(name)
    return found


def _power(read: Callable[[], NDArray]) -> _Power:
    single = read().astype(np.float32).reshape(-1)
    with np.errstate(over="ignore"):
        return _Power(float(np.dot(single, single)), single.size)


def _far(parts: Iterator[_Power] | Sequence[_Power], least: float, most: float) -> bool:
    """Whether numbers below `least` hold little, and none reaches `most`.

    Little is less than a quarter of the power. Both follow from the mean and the sum of the squares.
    """
    whole, numbers = map(sum, zip(*parts, strict=True))
    far: bool = 4 * numbers * least**2 <= whole < most**2
    return far
