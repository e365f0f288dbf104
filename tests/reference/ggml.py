"""libggml's own quantization and dequantization, from the library inside xllamacpp."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Numbers of `enum ggml_type`.
NUMBERS = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13,
    "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "bf16": 30, "mxfp4": 39, "q2_0": 42,
}  # fmt: skip


class Traits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """xllamacpp's extension module, loaded as a plain library."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    found = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    found.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return found


def traits(name: str) -> Traits:
    """The traits of a type, checked by its name."""
    found = library().ggml_get_type_traits(NUMBERS[name]).contents
    assert found.type_name.decode().lower() == name
    return found


def dequantize_row(raw: NDArray[np.uint8], name: str, count: int) -> NDArray[np.float32]:
    """One row dequantized by libggml."""
    out = np.empty(count, np.float32)
    raw = np.ascontiguousarray(raw)
    traits(name).to_float(raw.ctypes.data, out.ctypes.data, count)
    return out


def quantize_rows(
    weight: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Rows `[rows, in]` quantized by `ggml_quantize_chunk`, with importance `[in]`."""
    weight, found = np.ascontiguousarray(weight, np.float32), traits(name)
    rows, inputs = weight.shape
    out = np.empty((rows, inputs // found.blck_size * found.type_size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    size = library().ggml_quantize_chunk(
        NUMBERS[name], weight.ctypes.data, out.ctypes.data, 0, rows, inputs,
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    assert size == out.nbytes
    return out
