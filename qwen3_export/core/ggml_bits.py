"""How ggml's block types spread codes and scales over bytes.

    halves     a block of 32 codes: byte j holds code j below and code j + 16 above
    codes4     a super-block of 256: byte l of each 64 codes holds l and l + 32
    codes2     a super-block of 256: byte l of each 128 codes holds l, l + 32, l + 64 and l + 96
    high bit   one bit of each of 256 codes: bit j of byte l is that of code 32 j + l
    six bits   eight scales and eight mins of a super-block in twelve bytes

The last axis of an array is that of codes or bytes, the first ones those of rows and blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Fields = dict[str, NDArray]


def blocked(array: NDArray, size: int) -> NDArray:
    """Rows `[rows, n]` cut into blocks `[rows, n / size, size]`."""
    return array.reshape(len(array), -1, size)


def half_bytes(values: NDArray) -> Bytes:
    """fp16 numbers `[…, n]` as bytes `[…, 2 n]`."""
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def from_half_bytes(raw: Bytes) -> NDArray[np.float16]:
    """Inverse of `half_bytes`."""
    return np.ascontiguousarray(raw).view("<f2")


def join_bits(parts: NDArray, bits: int) -> Bytes:
    """Codes `[…, n, m]` of `bits` bits each as bytes `[…, m]`.

    The first code has the lowest bits.
    """
    packed = parts[..., 0, :].copy()
    for i in range(1, parts.shape[-2]):
        packed |= parts[..., i, :] << np.uint8(i * bits)
    return packed


def split_bits(raw: Bytes, bits: int) -> Bytes:
    """Inverse of `join_bits`: `[…, m]` to `[…, 8 / bits, m]`."""
    mask = np.uint8((1 << bits) - 1)
    return np.stack([(raw >> np.uint8(i * bits)) & mask for i in range(8 // bits)], -2)


def split_axis(codes: Bytes, *shape: int) -> Bytes:
    """Codes `[…, n]` as `[…, *shape]`."""
    return codes.reshape(*codes.shape[:-1], *shape)


def merge_axes(parts: NDArray, axes: int) -> NDArray:
    """The last `axes` axes made one."""
    return parts.reshape(*parts.shape[:-axes], -1)


def pack_halves(codes: Bytes, size: int) -> Bytes:
    """Four-bit codes of blocks of 32, as 16 bytes a block.

    Rows `[rows, n]` are cut into blocks of `size` first.
    """
    blocks = blocked(codes, size) if codes.ndim == 2 else codes
    return join_bits(split_axis(blocks & np.uint8(15), 2, 16), 4)


def unpack_halves(raw: Bytes) -> Bytes:
    """Inverse of `pack_halves`: bytes `[rows, blocks, 16]` as codes `[rows, 32 blocks]`."""
    return merge_axes(split_bits(raw, 4), 3)


def pack_fifth_bits(codes: Bytes) -> Bytes:
    """The fifth bits of 32 codes in four bytes."""
    return np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little")


def pack_codes4(codes: Bytes) -> Bytes:
    """The low four bits of 256 codes, in 128 bytes."""
    return merge_axes(join_bits(split_axis(codes & np.uint8(15), 4, 2, 32), 4), 2)


def unpack_codes4(raw: Bytes) -> Bytes:
    """Inverse of `pack_codes4`."""
    return merge_axes(split_bits(split_axis(raw, 4, 32), 4), 3)


def pack_codes2(codes: Bytes) -> Bytes:
    """The low two bits of 256 codes, in 64 bytes."""
    return merge_axes(join_bits(split_axis(codes & np.uint8(3), 2, 4, 32), 2), 2)


def unpack_codes2(raw: Bytes) -> Bytes:
    """Inverse of `pack_codes2`."""
    return merge_axes(split_bits(split_axis(raw, 2, 32), 2), 3)


def pack_high_bit(codes: Bytes, bit: int) -> Bytes:
    """One bit of each of 256 codes, in 32 bytes."""
    return join_bits(split_axis(codes >> np.uint8(bit), 8, 32), 1)


def unpack_high_bit(raw: Bytes) -> Bytes:
    """Inverse of `pack_high_bit`, for the lowest bit of each code."""
    return merge_axes(split_bits(raw, 1), 2)


def pack_six_bits(scales: NDArray, mins: NDArray) -> Bytes:
    """Eight scales and eight mins of six bits in twelve bytes.

    Four bytes hold the first four scales, four the first four mins, four the low halves of the other scales and mins.
    The high two bits of these others fill the top of the first eight bytes.
    """
    scales, mins = scales.view(np.uint8), mins.view(np.uint8)
    first = scales[..., :4] | (scales[..., 4:] >> np.uint8(4) << np.uint8(6))
    second = mins[..., :4] | (mins[..., 4:] >> np.uint8(4) << np.uint8(6))
    third = (scales[..., 4:] & np.uint8(15)) | (mins[..., 4:] << np.uint8(4))
    return np.concatenate([first, second, third], -1)


def unpack_six_bits(raw: Bytes) -> Fields:
    """Inverse of `pack_six_bits`, as the fields `scales` and `mins`."""
    first, second, third = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    low, two = np.uint8(63), np.uint8(6)
    scales = [first & low, (third & np.uint8(15)) | (first >> two << np.uint8(4))]
    mins = [second & low, (third >> np.uint8(4)) | (second >> two << np.uint8(4))]
    return {"scales": np.concatenate(scales, -1).view(np.int8), "mins": np.concatenate(mins, -1)}
