"""Bytes of ggml's block types, as pure pack and unpack pairs.

They turn a QuantizedTensor's fields into rows of a GGUF file, and back.

    q2_k    scale | min << 4 [16] · codes2 [64] · super_scale · super_min
    q3_k    high bits [32] · codes2 [64] · scales6 [12] · super_scale
    q4_k    super_scale · super_min · scales and mins of 6 bits [12] · codes4 [128]
    q5_k    super_scale · super_min · scales and mins of 6 bits [12] · high bits [32] · codes4 [128]
    q6_k    codes4 [128] · high bits [64] · scales [16] · super_scale
    iq4_xs  super_scale · high bits of scales [2] · low bits [4] · codes4 [128]
    iq4_nl  scale · codes4 [16]
    q4_1    scale · min · codes4 [16]
    q5_0    scale · high bits [4] · codes4 [16]         q5_1  scale · min · high bits [4] · codes4 [16]
    mxfp4   exponent · codes4 [16]                      q2_0  scale · codes2 [16]

A number in brackets is a count of bytes; `ggml_bits` says which codes share one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.ggml_bits import (
    Bytes,
    Fields,
    blocked,
    from_half_bytes,
    half_bytes,
    join_bits,
    merge_axes,
    pack_codes2,
    pack_codes4,
    pack_fifth_bits,
    pack_halves,
    pack_high_bit,
    pack_six_bits,
    split_axis,
    split_bits,
    unpack_codes2,
    unpack_codes4,
    unpack_halves,
    unpack_high_bit,
    unpack_six_bits,
)
from qwen3_export.core.pack import pack_bytes, unpack_bytes
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor


def pack_blocks(tensor: QuantizedTensor) -> Bytes:
    """Rows `[out, bytes per row]` of a block type, or of MXFP4."""
    if tensor.scheme.ggml_type is None:
        packed = np.concatenate([tensor.scales.view(np.uint8)[..., None], pack_halves(tensor.codes, 32)], -1)
        return packed.reshape(len(packed), -1)
    block = tensor.scheme.block_type
    assert block is not None
    fields = {
        "codes": blocked(tensor.codes, block.block),
        "scales": blocked(tensor.scales, block.block // block.group),
    }
    for name in ("mins", "super_scales", "super_mins"):
        if (array := getattr(tensor, name)) is not None:
            fields[name] = blocked(array, block.block // block.group if name == "mins" else 1)
    parts = _PACKERS[block.name](fields)
    return np.concatenate(parts, -1).reshape(tensor.shape[0], -1)


def unpack_blocks(raw: Bytes, name: str, scheme: QuantScheme) -> QuantizedTensor:
    """Inverse of `pack_blocks`, for rows `[out, bytes per row]`."""
    if scheme.ggml_type is None:
        blocks = raw.reshape(len(raw), -1, 17)
        codes, scales = unpack_halves(blocks[..., 1:]), np.ascontiguousarray(blocks[..., 0]).view(SCALE_TYPES["e8m0"])
        return QuantizedTensor(name, codes.shape, scheme, codes, scales)
    block = scheme.block_type
    assert block is not None
    blocks = raw.reshape(len(raw), -1, block.bytes_per_block)
    fields: dict[str, Any] = {
        key: np.ascontiguousarray(array).reshape(len(raw), -1) for key, array in _UNPACKERS[block.name](blocks).items()
    }
    return QuantizedTensor(name, fields["codes"].shape, scheme, **fields)


def pack_q2_0(codes: Bytes, scales: NDArray) -> Bytes:
    """Symmetric 2-bit codes `[out, in]` and scales `[out, in / 64]` as q2_0.

    Its numbers are −1 to 2, so that d = −scale.
    """
    packed = pack_bytes(blocked(np.uint8(3) - codes, 64), 2)
    return np.concatenate([half_bytes(-scales.astype(np.float32)[..., None]), packed], -1).reshape(len(codes), -1)


def unpack_q2_0(raw: Bytes) -> tuple[Bytes, NDArray[np.float16]]:
    """Inverse of `pack_q2_0`."""
    blocks = raw.reshape(len(raw), -1, 18)
    codes = unpack_bytes(blocks[..., 2:], 2).reshape(len(raw), -1)
    return np.uint8(3) - codes, -from_half_bytes(blocks[..., :2])[..., 0]


def _pack_q2_k(f: Fields) -> Sequence[Bytes]:
    scales = f["scales"].view(np.uint8) | (f["mins"] << np.uint8(4))
    return scales, pack_codes2(f["codes"]), half_bytes(f["super_scales"]), half_bytes(f["super_mins"])


def _unpack_q2_k(b: Bytes) -> Fields:
    return {
        "codes": unpack_codes2(b[..., 16:80]),
        "scales": (b[..., :16] & np.uint8(15)).view(np.int8),
        "mins": b[..., :16] >> np.uint8(4),
        "super_scales": from_half_bytes(b[..., 80:82]),
        "super_mins": from_half_bytes(b[..., 82:84]),
    }


def _pack_q3_k(f: Fields) -> Sequence[Bytes]:
    scales = (f["scales"] + np.int8(32)).view(np.uint8)
    low = join_bits(split_axis(scales & np.uint8(15), 2, 8), 4)
    high = join_bits(split_axis(scales >> np.uint8(4), 4, 4), 2)
    return pack_high_bit(f["codes"], 2), pack_codes2(f["codes"]), low, high, half_bytes(f["super_scales"])


def _unpack_q3_k(b: Bytes) -> Fields:
    low, high = merge_axes(split_bits(b[..., 96:104], 4), 2), merge_axes(split_bits(b[..., 104:108], 2), 2)
    return {
        "codes": unpack_codes2(b[..., 32:96]) | (unpack_high_bit(b[..., :32]) << np.uint8(2)),
        "scales": (low | (high << np.uint8(4))).view(np.int8) - np.int8(32),
        "super_scales": from_half_bytes(b[..., 108:110]),
    }


def _head(f: Fields) -> Sequence[Bytes]:
    """The first 16 bytes of q4_k and q5_k: scales and mins."""
    return half_bytes(f["super_scales"]), half_bytes(f["super_mins"]), pack_six_bits(f["scales"], f["mins"])


def _unpack_head(b: Bytes) -> Fields:
    supers = {"super_scales": from_half_bytes(b[..., :2]), "super_mins": from_half_bytes(b[..., 2:4])}
    return {**supers, **unpack_six_bits(b[..., 4:16])}


def _pack_q4_k(f: Fields) -> Sequence[Bytes]:
    return *_head(f), pack_codes4(f["codes"])


def _unpack_q4_k(b: Bytes) -> Fields:
    return {**_unpack_head(b), "codes": unpack_codes4(b[..., 16:])}


def _pack_q5_k(f: Fields) -> Sequence[Bytes]:
    return *_head(f), pack_high_bit(f["codes"], 4), pack_codes4(f["codes"])


def _unpack_q5_k(b: Bytes) -> Fields:
    codes = unpack_codes4(b[..., 48:]) | (unpack_high_bit(b[..., 16:48]) << np.uint8(4))
    return {**_unpack_head(b), "codes": codes}


def _pack_q6_k(f: Fields) -> Sequence[Bytes]:
    # The halves of 128: the low four bits of l and l + 64 share a byte, and of l + 32 and l + 96.
    low = join_bits(split_axis(f["codes"] & np.uint8(15), 2, 2, 64), 4)
    high = join_bits(split_axis(f["codes"] >> np.uint8(4), 2, 4, 32), 2)
    return merge_axes(low, 2), merge_axes(high, 2), f["scales"].view(np.uint8), half_bytes(f["super_scales"])


def _unpack_q6_k(b: Bytes) -> Fields:
    low, high = split_bits(split_axis(b[..., :128], 2, 64), 4), split_bits(split_axis(b[..., 128:192], 2, 32), 2)
    return {
        "codes": merge_axes(low, 3) | (merge_axes(high, 3) << np.uint8(4)),
        "scales": np.ascontiguousarray(b[..., 192:208]).view(np.int8),
        "super_scales": from_half_bytes(b[..., 208:210]),
    }


def _pack_iq4_xs(f: Fields) -> Sequence[Bytes]:
    scales = (f["scales"] + np.int8(32)).view(np.uint8)
    high = join_bits(split_axis(scales >> np.uint8(4), 2, 4).swapaxes(-1, -2), 2)
    low = join_bits(split_axis(scales & np.uint8(15), 4, 2).swapaxes(-1, -2), 4)
    return half_bytes(f["super_scales"]), high, low, merge_axes(join_bits(split_axis(f["codes"], 8, 2, 16), 4), 2)


def _unpack_iq4_xs(b: Bytes) -> Fields:
    high = merge_axes(split_bits(b[..., 2:4], 2).swapaxes(-1, -2), 2)
    low = merge_axes(split_bits(b[..., 4:8], 4).swapaxes(-1, -2), 2)
    return {
        "codes": merge_axes(split_bits(split_axis(b[..., 8:], 8, 16), 4), 3),
        "scales": (low | (high << np.uint8(4))).view(np.int8) - np.int8(32),
        "super_scales": from_half_bytes(b[..., :2]),
    }


def _pack_simple(f: Fields) -> Sequence[Bytes]:
    """iq4_nl and q4_1, and q5_0 and q5_1 without their high bits."""
    head = [half_bytes(f["scales"])] + ([half_bytes(f["mins"])] if "mins" in f else [])
    return *head, pack_halves(f["codes"], 32)


def _pack_five(f: Fields) -> Sequence[Bytes]:
    *head, low = _pack_simple(f)
    return *head, pack_fifth_bits(f["codes"]), low


def _unpack_simple(b: Bytes, mins: bool, high: bool) -> Fields:
    found, start = {"scales": from_half_bytes(b[..., :2])}, 2
    if mins:
        found["mins"], start = from_half_bytes(b[..., 2:4]), 4
    codes = merge_axes(split_bits(b[..., start + 4 * high :], 4), 2)
    if high:
        bits = np.unpackbits(np.ascontiguousarray(b[..., start : start + 4]), axis=-1, bitorder="little")
        codes = codes | (bits << np.uint8(4))
    return {**found, "codes": codes}


_PACKERS: dict[str, Callable[[Fields], Sequence[Bytes]]] = {
    "q2_k": _pack_q2_k,
    "q3_k": _pack_q3_k,
    "q4_k": _pack_q4_k,
    "q5_k": _pack_q5_k,
    "q6_k": _pack_q6_k,
    "iq4_xs": _pack_iq4_xs,
    "iq4_nl": _pack_simple,
    "q4_1": _pack_simple,
    "q5_0": _pack_five,
    "q5_1": _pack_five,
}
_UNPACKERS: dict[str, Callable[[Bytes], Fields]] = {
    "q2_k": _unpack_q2_k,
    "q3_k": _unpack_q3_k,
    "q4_k": _unpack_q4_k,
    "q5_k": _unpack_q5_k,
    "q6_k": _unpack_q6_k,
    "iq4_xs": _unpack_iq4_xs,
    "iq4_nl": lambda b: _unpack_simple(b, mins=False, high=False),
    "q4_1": lambda b: _unpack_simple(b, mins=True, high=False),
    "q5_0": lambda b: _unpack_simple(b, mins=False, high=True),
    "q5_1": lambda b: _unpack_simple(b, mins=True, high=True),
}
