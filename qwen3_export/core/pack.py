"""Pure pack/unpack pairs.

Each layout is drawn once; codes go in and come out unchanged.

int32 words   compressed-tensors, GPTQ    element i of a word in bits [i*b, (i+1)*b), low first
ORT blob      MatMulNBits                 [out, blocks, block*b/8], low nibble first
ggml q4_0     18 bytes per 32 weights     fp16 d | 16 bytes: weight j low nibble, j+16 high nibble
ggml q4_1     20 bytes per 32 weights     fp16 d | fp16 m | 16 bytes, the same nibbles
ggml q8_0     34 bytes per 32 weights     fp16 d | 32 signed bytes
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GGML_BLOCK = 32
# Bytes' worth of codes at once: they stay in a core's cache from one step to the next.
_CACHED = 1 << 15


def pack_int32(codes: NDArray[np.uint8], num_bits: int) -> NDArray[np.int32]:
    """Codes `[..., n]` as words `[..., ceil(n * num_bits / 32)]`.

    The first code has the lowest bits. Codes of 3, 5 and 6 bits cross the borders of words: 32 of them fill `num_bits`
    words.
    """
    if 32 % num_bits:
        return _pack_across(codes, num_bits)
    per_word = 32 // num_bits
    padding = -codes.shape[-1] % per_word
    if padding:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    return pack_bytes(codes, num_bits).view("<i4")


def unpack_int32(words: NDArray[np.int32], num_bits: int, count: int) -> NDArray[np.uint8]:
    """Inverse of `pack_int32`; `count` codes of the last axis are kept."""
    raw = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if 32 % num_bits:
        return _unpack_across(raw, num_bits)[..., :count]
    return unpack_bytes(raw, num_bits)[..., :count]


def _pack_across(codes: NDArray[np.uint8], num_bits: int) -> NDArray[np.int32]:
    """Codes whose width does not divide a word, eight at a time.

    Eight codes fill `num_bits` bytes, which are moved together in a word of 64 bits.
    """
    needed = -(-codes.shape[-1] * num_bits // 32)
    padding = -codes.shape[-1] % 32
    if padding:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    words = np.ascontiguousarray(codes).view("<u8")
    packed = np.zeros_like(words)
    for i in range(8):
        packed |= (words >> np.uint64(i * (8 - num_bits))) & np.uint64(((1 << num_bits) - 1) << (i * num_bits))
    taken = packed.view(np.uint8).reshape(*words.shape, 8)[..., :num_bits]
    found = np.ascontiguousarray(taken).reshape(*codes.shape[:-1], -1).view("<i4")
    return np.ascontiguousarray(found[..., :needed])


def _unpack_across(raw: NDArray[np.uint8], num_bits: int) -> NDArray[np.uint8]:
    """Inverse of `_pack_across` on bytes."""
    padding = -raw.shape[-1] % num_bits
    if padding:
        raw = np.pad(raw, [(0, 0)] * (raw.ndim - 1) + [(0, padding)])
    taken = raw.reshape(*raw.shape[:-1], -1, num_bits)
    words = np.zeros((*taken.shape[:-1], 8), np.uint8)
    words[..., :num_bits] = taken
    packed = words.view("<u8")[..., 0]
    codes = np.zeros_like(packed)
    for i in range(8):
        codes |= (packed & np.uint64(((1 << num_bits) - 1) << (i * num_bits))) << np.uint64(i * (8 - num_bits))
    return codes.view(np.uint8).reshape(*raw.shape[:-1], -1)


def pack_bytes(codes: NDArray[np.uint8], num_bits: int) -> NDArray[np.uint8]:
    """Codes `[..., n]` of 2, 4 or 8 bits as bytes.

    The bytes are `[..., n * num_bits / 8]`. The first code has the lowest bits; an incomplete last byte is filled with
    zero bits.
    """
    per_byte = 8 // num_bits
    padding = -codes.shape[-1] % per_byte
    if padding:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    codes = np.ascontiguousarray(codes)
    if per_byte == 1:
        return codes
    # The codes of a byte are one word; each is shifted to its place, and the conversion to a byte cuts off the rest.
    words = codes.reshape(-1).view(f"<u{per_byte}")
    packed = np.empty(words.size, np.uint8)
    for begin in range(0, words.size, _CACHED):
        piece = words[begin : begin + _CACHED]
        moved = piece >> piece.dtype.type(8 - num_bits)
        moved |= piece
        for i in range(2, per_byte):
            moved |= piece >> piece.dtype.type(i * (8 - num_bits))
        np.copyto(packed[begin : begin + _CACHED], moved, casting="unsafe")
    return packed.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte)


def unpack_bytes(packed: NDArray[np.uint8], num_bits: int) -> NDArray[np.uint8]:
    """Inverse of `pack_bytes` (padding codes included)."""
    per_byte, flat = 8 // num_bits, np.ascontiguousarray(packed).reshape(-1)
    if per_byte == 1:
        return flat.reshape(packed.shape).copy()
    # A byte as one word of its codes: each moved up to its place, then cut out.
    words = np.empty(flat.size, f"<u{per_byte}")
    mask = sum(((1 << num_bits) - 1) << (8 * i) for i in range(per_byte))
    for begin in range(0, flat.size, _CACHED):
        piece = flat[begin : begin + _CACHED].astype(words.dtype)
        spread = words[begin : begin + _CACHED]
        np.left_shift(piece, words.dtype.type(8 - num_bits), out=spread)
        for i in range(2, per_byte):
            spread |= piece << words.dtype.type(i * (8 - num_bits))
        spread |= piece
        spread &= words.dtype.type(mask)
    return words.view(np.uint8).reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)


def pack_q4_0(codes: NDArray[np.uint8], scales: NDArray) -> NDArray[np.uint8]:
    """Codes and scales as q4_0 blocks.

    Codes are `[out, in]`, scales `[out, in / 32]` and exact in fp16; the result is `[out, in / 32 * 18]`.
    """
    return _ggml_rows([_half_bytes(scales)], _nibbles(codes))


def unpack_q4_0(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Inverse of `pack_q4_0`: codes `[out, in]` and fp16 scales `[out, in / 32]`."""
    blocks = raw.reshape(raw.shape[0], -1, 18)
    return _from_nibbles(blocks[..., 2:]), _half_values(blocks[..., :2])


def pack_q4_1(codes: NDArray[np.uint8], scales: NDArray, minimums: NDArray) -> NDArray[np.uint8]:
    """As `pack_q4_0`, with a minimum: weight = scale * code + minimum.

    Scale and minimum are fp16.
    """
    return _ggml_rows([_half_bytes(scales), _half_bytes(minimums)], _nibbles(codes))


def unpack_q4_1(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Inverse of `pack_q4_1`: codes, scales, minimums."""
    blocks = raw.reshape(raw.shape[0], -1, 20)
    return _from_nibbles(blocks[..., 4:]), _half_values(blocks[..., :2]), _half_values(blocks[..., 2:4])


def pack_q8_0(codes: NDArray[np.uint8], scales: NDArray) -> NDArray[np.uint8]:
    """Unsigned 8-bit codes with zero point 128 as q8_0 blocks.

    Codes are `[out, in]`, scales `[out, in / 32]`; the result is `[out, in / 32 * 34]`.
    """
    signed = (codes ^ np.uint8(0x80)).reshape(codes.shape[0], -1, GGML_BLOCK)
    return _ggml_rows([_half_bytes(scales)], signed)


def unpack_q8_0(raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Inverse of `pack_q8_0`: unsigned codes and fp16 scales."""
    blocks = raw.reshape(raw.shape[0], -1, 34)
    codes = (blocks[..., 2:] ^ np.uint8(0x80)).reshape(raw.shape[0], -1)
    return codes, _half_values(blocks[..., :2])


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    blocks = codes.reshape(codes.shape[0], -1, GGML_BLOCK)
    return blocks[..., :16] | (blocks[..., 16:] << np.uint8(4))


def _from_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    codes = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return codes.reshape(packed.shape[0], -1)


def _half_bytes(values: NDArray) -> NDArray[np.uint8]:
    return values.astype("<f2")[..., None].view(np.uint8)


def _half_values(raw: NDArray[np.uint8]) -> NDArray[np.float16]:
    return np.ascontiguousarray(raw).view("<f2")[..., 0]


def _ggml_rows(head: list[NDArray[np.uint8]], body: NDArray[np.uint8]) -> NDArray[np.uint8]:
    blocks = np.concatenate([*head, body], axis=-1)
    return blocks.reshape(blocks.shape[0], -1)
