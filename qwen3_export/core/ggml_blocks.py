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

Within a block of 32 code j is the low half of byte j, code j + 16 the high half. In super-blocks of 256,
codes4: byte l of each 64 holds l and l + 32; codes2: byte l of each 128 holds l, l + 32, l + 64, l + 96.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.pack import pack_bytes, unpack_bytes
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor

Bytes = NDArray[np.uint8]
Fields = dict[str, NDArray]


def pack_blocks(tensor: QuantizedTensor) -> Bytes:
    """Rows of a GGUF tensor `[out, bytes per row]` from a block type's fields.

    MXFP4 counts as a block type.
    """
    if tensor.scheme.ggml_type is None:
        packed = np.concatenate([tensor.scales.view(np.uint8)[..., None], _halves(tensor.codes, 32)], -1)
        return packed.reshape(len(packed), -1)
    block = tensor.scheme.block_type
    assert block is not None
    fields = {
        "codes": _blocked(tensor.codes, block.block),
        "scales": _blocked(tensor.scales, block.block // block.group),
    }
    for name in ("mins", "super_scales", "super_mins"):
        if (array := getattr(tensor, name)) is not None:
            fields[name] = _blocked(array, block.block // block.group if name == "mins" else 1)
    parts = _PACKERS[block.name](fields)
    return np.concatenate(parts, -1).reshape(tensor.shape[0], -1)


def unpack_blocks(raw: Bytes, name: str, scheme: QuantScheme) -> QuantizedTensor:
    """Inverse of `pack_blocks`, for rows `[out, bytes per row]`."""
    if scheme.ggml_type is None:
        blocks = raw.reshape(len(raw), -1, 17)
        codes, scales = _from_halves(blocks[..., 1:]), np.ascontiguousarray(blocks[..., 0]).view(SCALE_TYPES["e8m0"])
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
    packed = pack_bytes(_blocked(np.uint8(3) - codes, 64), 2)
    return np.concatenate([_half(-scales.astype(np.float32)[..., None]), packed], -1).reshape(len(codes), -1)


def unpack_q2_0(raw: Bytes) -> tuple[Bytes, NDArray[np.float16]]:
    """Inverse of `pack_q2_0`."""
    blocks = raw.reshape(len(raw), -1, 18)
    codes = unpack_bytes(blocks[..., 2:], 2).reshape(len(raw), -1)
    return np.uint8(3) - codes, -_floats(blocks[..., :2])[..., 0]


def _blocked(array: NDArray, size: int) -> NDArray:
    return array.reshape(len(array), -1, size)


def _half(values: NDArray) -> Bytes:
    """fp16 numbers `[…, n]` as bytes `[…, 2 n]`."""
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def _floats(raw: Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(raw).view("<f2")


def _join(parts: NDArray, bits: int) -> Bytes:
    """Bytes `[…, m]` of n codes of `bits` bits each, `[…, n, m]`.

    The first code has the lowest bits.
    """
    packed = parts[..., 0, :].copy()
    for i in range(1, parts.shape[-2]):
        packed |= parts[..., i, :] << np.uint8(i * bits)
    return packed


def _split(raw: Bytes, bits: int) -> Bytes:
    """Inverse of `_join`: `[…, m]` to `[…, 8 / bits, m]`."""
    mask = np.uint8((1 << bits) - 1)
    return np.stack([(raw >> np.uint8(i * bits)) & mask for i in range(8 // bits)], -2)


def _parts(codes: Bytes, *shape: int) -> Bytes:
    return codes.reshape(*codes.shape[:-1], *shape)


def _flat(parts: NDArray, axes: int) -> NDArray:
    return parts.reshape(*parts.shape[:-axes], -1)


def _halves(codes: Bytes, size: int) -> Bytes:
    """Four-bit codes in blocks of 32: `[…, 16]` bytes of every block."""
    blocks = _blocked(codes, size) if codes.ndim == 2 else codes
    return _join(_parts(blocks & np.uint8(15), 2, 16), 4)


def _from_halves(raw: Bytes) -> Bytes:
    """Inverse of `_halves`, as rows of codes."""
    return _flat(_split(raw, 4), 3)


def _high_of_32(codes: Bytes) -> Bytes:
    """The fifth bits of 32 codes in four bytes."""
    return np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little")


def _nibbles(codes: Bytes) -> Bytes:
    """codes4 of a super-block."""
    return _flat(_join(_parts(codes & np.uint8(15), 4, 2, 32), 4), 2)


def _from_nibbles(raw: Bytes) -> Bytes:
    return _flat(_split(_parts(raw, 4, 32), 4), 3)


def _pairs(codes: Bytes) -> Bytes:
    """codes2 of a super-block."""
    return _flat(_join(_parts(codes & np.uint8(3), 2, 4, 32), 2), 2)


def _from_pairs(raw: Bytes) -> Bytes:
    return _flat(_split(_parts(raw, 2, 32), 2), 3)


def _high_bits(codes: Bytes, bit: int) -> Bytes:
    """One bit of each of 256 codes, packed.

    Bit j of byte l is that of code 32 j + l.
    """
    return _join(_parts(codes >> np.uint8(bit), 8, 32), 1)


def _from_high_bits(raw: Bytes) -> Bytes:
    return _flat(_split(raw, 1), 2)


def _six_bits(scales: NDArray, mins: NDArray) -> Bytes:
    """Eight scales and eight mins of six bits in twelve bytes.

    The upper four give two bits each to the lower.
    """
    scales, mins = scales.view(np.uint8), mins.view(np.uint8)
    first = scales[..., :4] | (scales[..., 4:] >> np.uint8(4) << np.uint8(6))
    second = mins[..., :4] | (mins[..., 4:] >> np.uint8(4) << np.uint8(6))
    third = (scales[..., 4:] & np.uint8(15)) | (mins[..., 4:] << np.uint8(4))
    return np.concatenate([first, second, third], -1)


def _from_six_bits(raw: Bytes) -> Fields:
    first, second, third = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    low, two = np.uint8(63), np.uint8(6)
    scales = [first & low, (third & np.uint8(15)) | (first >> two << np.uint8(4))]
    mins = [second & low, (third >> np.uint8(4)) | (second >> two << np.uint8(4))]
    return {"scales": np.concatenate(scales, -1).view(np.int8), "mins": np.concatenate(mins, -1)}


def _pack_q2_k(f: Fields) -> Sequence[Bytes]:
    scales = f["scales"].view(np.uint8) | (f["mins"] << np.uint8(4))
    return scales, _pairs(f["codes"]), _half(f["super_scales"]), _half(f["super_mins"])


def _unpack_q2_k(b: Bytes) -> Fields:
    return {
        "codes": _from_pairs(b[..., 16:80]),
        "scales": (b[..., :16] & np.uint8(15)).view(np.int8),
        "mins": b[..., :16] >> np.uint8(4),
        "super_scales": _floats(b[..., 80:82]),
        "super_mins": _floats(b[..., 82:84]),
    }


def _pack_q3_k(f: Fields) -> Sequence[Bytes]:
    scales = (f["scales"] + np.int8(32)).view(np.uint8)
    low, high = _join(_parts(scales & np.uint8(15), 2, 8), 4), _join(_parts(scales >> np.uint8(4), 4, 4), 2)
    return _high_bits(f["codes"], 2), _pairs(f["codes"]), low, high, _half(f["super_scales"])


def _unpack_q3_k(b: Bytes) -> Fields:
    low, high = _flat(_split(b[..., 96:104], 4), 2), _flat(_split(b[..., 104:108], 2), 2)
    return {
        "codes": _from_pairs(b[..., 32:96]) | (_from_high_bits(b[..., :32]) << np.uint8(2)),
        "scales": (low | (high << np.uint8(4))).view(np.int8) - np.int8(32),
        "super_scales": _floats(b[..., 108:110]),
    }


def _pack_q4_k(f: Fields) -> Sequence[Bytes]:
    return _half(f["super_scales"]), _half(f["super_mins"]), _six_bits(f["scales"], f["mins"]), _nibbles(f["codes"])


def _unpack_q4_k(b: Bytes) -> Fields:
    supers = {"super_scales": _floats(b[..., :2]), "super_mins": _floats(b[..., 2:4])}
    return {**supers, **_from_six_bits(b[..., 4:16]), "codes": _from_nibbles(b[..., 16:])}


def _pack_q5_k(f: Fields) -> Sequence[Bytes]:
    head = (_half(f["super_scales"]), _half(f["super_mins"]), _six_bits(f["scales"], f["mins"]))
    return *head, _high_bits(f["codes"], 4), _nibbles(f["codes"])


def _unpack_q5_k(b: Bytes) -> Fields:
    codes = _from_nibbles(b[..., 48:]) | (_from_high_bits(b[..., 16:48]) << np.uint8(4))
    supers = {"super_scales": _floats(b[..., :2]), "super_mins": _floats(b[..., 2:4])}
    return {**supers, **_from_six_bits(b[..., 4:16]), "codes": codes}


def _pack_q6_k(f: Fields) -> Sequence[Bytes]:
    # The halves of 128: the low four bits of l and l + 64 share a byte, and of l + 32 and l + 96.
    low = _join(_parts(f["codes"] & np.uint8(15), 2, 2, 64), 4)
    high = _join(_parts(f["codes"] >> np.uint8(4), 2, 4, 32), 2)
    return _flat(low, 2), _flat(high, 2), f["scales"].view(np.uint8), _half(f["super_scales"])


def _unpack_q6_k(b: Bytes) -> Fields:
    low, high = _split(_parts(b[..., :128], 2, 64), 4), _split(_parts(b[..., 128:192], 2, 32), 2)
    return {
        "codes": _flat(low, 3) | (_flat(high, 3) << np.uint8(4)),
        "scales": np.ascontiguousarray(b[..., 192:208]).view(np.int8),
        "super_scales": _floats(b[..., 208:210]),
    }


def _pack_iq4_xs(f: Fields) -> Sequence[Bytes]:
    scales = (f["scales"] + np.int8(32)).view(np.uint8)
    high = _join(_parts(scales >> np.uint8(4), 2, 4).swapaxes(-1, -2), 2)
    low = _join(_parts(scales & np.uint8(15), 4, 2).swapaxes(-1, -2), 4)
    return _half(f["super_scales"]), high, low, _flat(_join(_parts(f["codes"], 8, 2, 16), 4), 2)


def _unpack_iq4_xs(b: Bytes) -> Fields:
    high = _flat(_split(b[..., 2:4], 2).swapaxes(-1, -2), 2)
    low = _flat(_split(b[..., 4:8], 4).swapaxes(-1, -2), 2)
    return {
        "codes": _flat(_split(_parts(b[..., 8:], 8, 16), 4), 3),
        "scales": (low | (high << np.uint8(4))).view(np.int8) - np.int8(32),
        "super_scales": _floats(b[..., :2]),
    }


def _pack_simple(f: Fields) -> Sequence[Bytes]:
    """iq4_nl, q4_1, q5_0 and q5_1: what a type has not is left out."""
    head = [_half(f["scales"])] + ([_half(f["mins"])] if "mins" in f else [])
    return *head, _halves(f["codes"], 32)


def _pack_five(f: Fields) -> Sequence[Bytes]:
    *head, low = _pack_simple(f)
    return *head, _high_of_32(f["codes"]), low


def _unpack_simple(b: Bytes, mins: bool, high: bool) -> Fields:
    found, start = {"scales": _floats(b[..., :2])}, 2
    if mins:
        found["mins"], start = _floats(b[..., 2:4]), 4
    codes = _flat(_split(b[..., start + 4 * high :], 4), 2)
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
