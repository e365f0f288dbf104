"""Sizes of the pieces that work is cut into.

They are part of what decides the bytes, and what memory is estimated from.
"""

from __future__ import annotations

# Tokens of the calibration samples whose inputs are in memory together.
TOKENS_AT_ONCE = 4096
# Tokens that go through a layer's experts together.
ROUTED_TOKENS = 8192
# A linear with more inputs is solved with one factor in memory at a time, where else two are made side by side.
WIDE = 8192
# Tokens that stand for all of a layer at an expert's down_proj, unless the floor is higher.
SAMPLE_TOKENS = 1024
# Output rows of a linear that are solved together.
ROWS_AT_ONCE = 512
# A fold is searched on every eighth sample.
FOLD_EVERY = 8
# Experts whose rounding error speaks for all when a scale is searched before the router.
FOLD_EXPERTS = 8
# Experts that are solved side by side may take so much together; on this alone no byte depends.
APART_BYTES = 4 << 30
# The pass that measures which outputs matter: output rows of a piece of G, tokens on the way back, and at the head.
OUTPUT_PIECE = 256
BACK_TOKENS = 2048
TOP_TOKENS = 128
# Weights of an embedding or head that are solved together: 64 MiB in fp32.
PIECE_WEIGHTS = 1 << 24


def samples_at_once(length: int) -> int:
    """Samples of `length` tokens whose inputs are in memory together."""
    return max(1, TOKENS_AT_ONCE // length)


def out_rows_at_once(width: int) -> int:
    """Output rows that are solved together, for a matrix of `width` inputs."""
    return max(PIECE_WEIGHTS // width // 512, 1) * 512
