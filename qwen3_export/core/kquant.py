"""Block types of ggml that no integer or float scheme describes.

These are K-quants, types with nonlinear 4-bit codes, and types with fp16 minimums.

    type            weight                                            shares
    q2_k q4_k q5_k  super_scale · scale · code − super_min · min      scale and min: 16 or 32 weights, super: 256
    q3_k q6_k       super_scale · scale · (code − midpoint)           scale: 16 weights, super: 256
    iq4_xs          super_scale · scale · VALUES[code]                scale: 32 weights, super: 256
    iq4_nl          scale · VALUES[code]                              32 weights
    q5_0            scale · (code − 16)                               32 weights
    q4_1 q5_1       scale · code + min                                32 weights

Scales and mins under a super scale are small integers; everything else is fp16. q4_0, q8_0, q2_0 and mxfp4 are not
here: they are integer and float schemes with one scale per group (`core.scheme.scheme_of_type`).
"""

from __future__ import annotations

from dataclasses import dataclass

SUPER_BLOCK = 256
# What the sixteen codes of iq4_nl and iq4_xs stand for, in units of the scale.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """One block type.

    `block` weights are stored together, in `bytes_per_block` bytes of a GGUF file; `group` of them share a scale.
    `scale_range` is the range of integer scales under a super scale; mins are at most `max_min`.
    """

    name: str
    num_bits: int
    group: int
    block: int
    bytes_per_block: int
    has_mins: bool = False
    scale_range: tuple[int, int] = (0, 0)
    max_min: int = 0
    values: tuple[int, ...] | None = None

    @property
    def is_super(self) -> bool:
        """Whether the scales are integers under a super scale."""
        return self.block == SUPER_BLOCK


_ALL = (
    BlockType("q2_k", 2, 16, 256, 84, True, (0, 15), 15),
    BlockType("q3_k", 3, 16, 256, 110, scale_range=(-32, 31)),
    BlockType("q4_k", 4, 32, 256, 144, True, (0, 63), 63),
    BlockType("q5_k", 5, 32, 256, 176, True, (0, 63), 63),
    BlockType("q6_k", 6, 16, 256, 210, scale_range=(-128, 127)),
    BlockType("iq4_xs", 4, 32, 256, 136, scale_range=(-32, 31), values=IQ4_VALUES),
    BlockType("iq4_nl", 4, 32, 32, 18, values=IQ4_VALUES),
    BlockType("q4_1", 4, 32, 32, 20, True),
    BlockType("q5_0", 5, 32, 32, 22),
    BlockType("q5_1", 5, 32, 32, 24, True),
)
BLOCK_TYPES = {item.name: item for item in _ALL}
