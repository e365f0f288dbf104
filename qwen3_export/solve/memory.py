"""The memory that a quantization run takes, from the model's widths.

The number of layers does not matter, since one block is in memory at a time.

    always      Python, torch, and what the allocator keeps
    block       the largest layer: linears in fp32 and as codes; experts as codes, for they are read when needed
    running     experts in the type of the products, for each model that runs; see `model.streamed`
    linear      moments and factors of the widest input, and the work on the largest linear
    routed      samples that go through a layer's experts together
    embedding   the table that the first hidden states are taken from

The peak is the part that is always there plus the largest of these phases: the embedding; a linear outside the experts;
an expert, or samples on their way through all experts, beside the running weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.processors import thread_count
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.model.windows import RESIDENT_BYTES, WINDOW_BYTES
from qwen3_export.solve.chunk_sizes import (
    APART_BYTES,
    BACK_TOKENS,
    ROUTED_TOKENS,
    ROWS_AT_ONCE,
    SAMPLE_TOKENS,
    TOKENS_AT_ONCE,
    TOP_TOKENS,
    WIDE,
    out_rows_at_once,
)
from qwen3_export.text.samples import Samples

# Measured on Linux with torch 2.13, and without torch, in both cases with kernels compiled on the way.
_BASE_BYTES, _PLAIN_BASE_BYTES = 440 << 20, 240 << 20
# What a first run takes beside for compiling the loops of llama.cpp's types, which quantized embeddings have.
_LOOPS_BYTES = 130 << 20
# What the allocator keeps of freed pieces: this share of what is alive, and no more than so many bytes.
_HOLES_SHARE, _HOLES_BYTES = 0.32, 280 << 20
# What is still kept when the run is over, as a share of the peak above what is always there.
_LEFT_SHARE = 0.3
# Square matrices of a linear's inputs that are alive together: four moments, and factors; without the original beside;
# and where one factor is made at a time.
_SQUARES, _SQUARES_ALONE, _SQUARES_WIDE = 9, 6, 4
_PIECES = 8


@dataclass(frozen=True)
class Memory:
    """The parts of a run's memory in bytes; see the module docstring."""

    always: int
    block: int = 0
    running: int = 0
    linear: int = 0
    expert: int = 0
    routed: int = 0
    embedding: int = 0
    outer: int = 0
    most_holes: int = 0

    @property
    def peak(self) -> int:
        """Peak of resident memory in bytes: the largest phase and what the allocator keeps."""
        experts = self.running + max(self.expert, self.routed)
        alive = max(self.block + max(self.linear, experts), self.embedding, self.outer)
        return self.always + alive + min(int(_HOLES_SHARE * alive), self.most_holes)

    @property
    def without_blocks(self) -> int:
        """The same of a process that has its blocks solved by others.

        It has embedding, pass back and head.
        """
        return replace(self, block=0, running=0, linear=0, expert=0, routed=0).peak


def memory_parts(
    config: Qwen3Config, samples: Samples | None, original: bool = False, token_floor: int = 0,
    fisher_samples: int = 0, outer: bool = False, without_torch: bool = False,
) -> Memory:  # fmt: skip
    """Estimated memory of a run.

    `original`: the original model runs beside the quantized one. `token_floor`: tokens below which an expert is
    lent its layer's moments. `fisher_samples`: samples of the pass back through the model, which keeps every linear's
    output and slope of a few samples. `outer`: embedding or head are quantized. `without_torch`: nothing of the
    model runs.
    """
    shapes = max((config.linear_shapes(layer) for layer in range(config.num_layers)), key=_weights)
    if without_torch:
        # The codes of one block, and of another that is being written; part of what is read.
        largest = max(map(math.prod, shapes.values()))
        return Memory(_PLAIN_BASE_BYTES, min(2, config.num_layers) * _weights(shapes) + largest)
    own = {name: shape for name, shape in shapes.items() if samples is None or not is_expert(name)}
    experts = {name: shape for name, shape in shapes.items() if name not in own}
    block = (7 if original else 5) * _weights(own) + _weights(experts)
    running = 2 * _weights(experts)
    running = (running if running <= RESIDENT_BYTES else WINDOW_BYTES) * (1 + original)
    return Memory(
        _BASE_BYTES, block, running, _linear(list(own.values()), samples is not None, original),
        _experts(config, experts, original) + _lent(config, samples, token_floor) if experts else 0,
        _routed(config, samples) if experts and samples is not None else 0,
        _passes(config, fisher_samples) if samples is not None else 0,
        _outer(config, samples, original) if outer else 0, _HOLES_BYTES,
    )  # fmt: skip


def left_behind(peak: int, without_torch: bool) -> int:
    """Bytes that a run with this peak leaves in its process.

    They are libraries, and part of what was freed.
    """
    base = _PLAIN_BASE_BYTES if without_torch else _BASE_BYTES
    return base + int(_LEFT_SHARE * max(0, peak - base))


def _weights(shapes: dict[str, tuple[int, int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def experts_at_once(config: Qwen3Config, original: bool, threads: int) -> int:
    """Experts that are solved side by side: one in every thread, if memory allows."""
    return max(1, min(threads, APART_BYTES // _expert(config, original, 1)))


def _expert(config: Qwen3Config, original: bool, threads: int) -> int:
    width, inner = config.hidden_size, config.moe_intermediate_size
    return _linear([(inner, width), (width, inner)], True, original, threads)


def _experts(config: Qwen3Config, shapes: dict[str, tuple[int, int]], original: bool) -> int:
    """The most that experts take which are solved side by side."""
    threads = thread_count()
    beside = min(experts_at_once(config, original, threads), config.num_experts)
    return beside * _linear(list(shapes.values()), True, original, max(1, threads // beside))


def _linear(shapes: list[tuple[int, int]], with_inputs: bool, original: bool, threads: int | None = None) -> int:
    """The most that one of these linears takes while it is solved."""
    return max(_one(out_rows, width, with_inputs, original, threads) for out_rows, width in set(shapes))


def _one(out_rows: int, width: int, with_inputs: bool, original: bool, threads: int | None) -> int:
    # What is to be met and codes, whole; some rows of it with scales, zeros and what is left, in every thread.
    beside = thread_count() if threads is None else threads
    total = 6 * out_rows * width + 4 * _PIECES * beside * min(ROWS_AT_ONCE, out_rows) * width
    if with_inputs:
        squares = (_SQUARES_WIDE if width > WIDE else _SQUARES) if original else _SQUARES_ALONE
        targets = 3 * out_rows * width if original and out_rows < width else 0
        total += 4 * (squares * width * width + targets + 3 * TOKENS_AT_ONCE * width)
    return total


def _lent(config: Qwen3Config, samples: Samples | None, token_floor: int) -> int:
    """The layer's common moments, and the tokens that are passed through one expert."""
    assert samples is not None
    lent = min(max(token_floor, SAMPLE_TOKENS), samples.tokens)
    return 4 * (config.expert_width**2 + lent * (config.hidden_size + 3 * config.moe_intermediate_size))


def _routed(config: Qwen3Config, samples: Samples) -> int:
    """Inputs and outputs of the chosen experts, residual streams, and `missing`.

    One expert more: the router may send every token to the same one, whose inputs and outputs are also held apart,
    padded, and copied.
    """
    widths = config.moe_intermediate_size + config.hidden_size
    chosen, alone = 2 * config.experts_per_token * widths, 2 * 3 * widths
    together = min(thread_count() * ROUTED_TOKENS, samples.tokens)
    return together * (chosen + alone + 14 * config.hidden_size)


def _passes(config: Qwen3Config, fisher_samples: int) -> int:
    """The embedding as it is stored, and outputs and slopes of the pass back."""
    table = 2 * config.vocab_size * config.hidden_size
    if not fisher_samples:
        return table
    per_token = sum(shape[0] for shape in config.linear_shapes(0).values())
    weights = _weights(config.linear_shapes(0))
    return table + 4 * (2 * BACK_TOKENS * per_token + 2 * TOP_TOKENS * config.vocab_size) + 6 * weights


def _outer(config: Qwen3Config, samples: Samples | None, original: bool) -> int:
    """Codes of the table in pieces, joined and packed; work on a piece.

    Loops for its types are compiled on the way.
    """
    piece = min(out_rows_at_once(config.hidden_size), config.vocab_size) * config.hidden_size
    squares = 0 if samples is None else (14 if original else 8) * config.hidden_size**2
    return _LOOPS_BYTES + 3 * config.vocab_size * config.hidden_size + 4 * (6 * piece + squares)
