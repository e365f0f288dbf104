"""The whole model: hidden states of sequences, logits, greedy text.

One block is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import Qwen3Config, block_name
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.model.activations import rounder
from qwen3_export.model.block import Block, KVCache, rms_norm
from qwen3_export.model.streamed import StreamedWeights
from qwen3_export.model.table import open_tables, to_torch
from qwen3_export.model.workers import Workers

__all__ = ["Caches", "Decoder", "Rope", "load_block", "put_quantized", "rope_tables", "to_torch"]

Rope = tuple[Tensor, Tensor]
Caches = list[KVCache]


def load_block(checkpoint: Checkpoint, layer: int, device: str = "cpu", streamed: bool = False) -> Block:
    """Read one block and dequantize its linears, in fp32.

    `streamed`: experts of a 16-bit checkpoint are read when they are needed (`model.streamed`).
    """
    config, prefix = checkpoint.config, block_name(layer)
    weights = {
        name: to_torch(checkpoint.read(f"{prefix}.{name}.weight")).float().to(device)
        for name in config.other_shapes(layer)
    }
    block = Block(config, layer, weights)
    later: dict[str, int] = {}
    for name, shape in config.linear_shapes(layer).items():
        if streamed and is_expert(name):
            later[name] = math.prod(shape)
            continue
        stored = checkpoint.linear(f"{prefix}.{name}")
        if isinstance(stored, QuantizedTensor):
            put_quantized(block, name, stored, device)
        else:
            weights[name] = to_torch(stored).float().to(device)
    if later:
        block.weights = StreamedWeights(
            weights, later, lambda name: to_torch(checkpoint.read(f"{prefix}.{name}.weight")).float()
        )
    return block


def put_quantized(
    block: Block, name: str, tensor: QuantizedTensor, device: str = "cpu", in_place: bool = False
) -> None:
    """Replace one linear of a block by a quantized tensor.

    With `in_place` the dequantized numbers overwrite the weight, which nobody else may hold then.
    """
    if block.int_matmul:
        from qwen3_export.model.integer_linear import from_codes

        if (codes := from_codes(tensor)) is not None:
            block.integer_linears[name] = codes
            del block.weights[name]
            return
    if tensor.scheme.activations:
        block.rounders[name] = rounder(tensor.scheme, tensor.input_scale)
    if isinstance(block.weights, StreamedWeights) and block.weights.is_streamed(name):
        block.weights.put(name, tensor)
        return
    weight = torch.from_numpy(dequantize(tensor)).to(device, block.matmul_dtype)
    same = in_place and block.weights[name].dtype == weight.dtype
    block.weights[name] = block.weights[name].copy_(weight) if same else weight


def rope_tables(config: Qwen3Config, begin: int, end: int, device: str = "cpu") -> Rope:
    """Cos and sin `[end - begin, head_dim / 2]` for these positions."""
    cos, sin = config.rope.cos_sin(config.head_dim, end)
    return torch.from_numpy(cos[begin:]).to(device), torch.from_numpy(sin[begin:]).to(device)


class Decoder:
    """Runs sequences through the model, block after block.

    A small model's blocks stay in memory in fp32, which makes decoding fast; those of a model beyond
    `RESIDENT_PARAMETERS` are read again in each pass, so that memory is bounded by one block.
    """

    RESIDENT_PARAMETERS = 1_000_000_000

    def __init__(self, checkpoint: Checkpoint, pool: Workers | None = None) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self._pool = pool
        self._resident: list[Block] | None = None
        if self.config.num_parameters <= self.RESIDENT_PARAMETERS:
            self._resident = [load_block(checkpoint, layer) for layer in range(self.config.num_layers)]
        self._embedding, self._head = open_tables(checkpoint, expand=self._resident is not None)
        self._norm = to_torch(checkpoint.read("model.norm.weight")).float()

    def _blocks(self) -> Iterator[Block]:
        if self._resident is not None:
            yield from self._resident
        else:
            yield from (load_block(self.checkpoint, layer) for layer in range(self.config.num_layers))

    def new_caches(self) -> Caches:
        """Empty key/value caches of one sequence, one per layer."""
        return [KVCache() for _ in range(self.config.num_layers)]

    @torch.no_grad()
    def hidden(
        self,
        rows: Sequence[NDArray],
        caches: Sequence[Caches] | None = None,
        tick: Callable[[], object] = lambda: None,
    ) -> list[Tensor]:
        """Hidden states after the final norm, `[tokens, hidden]` for each row of token ids.

        `caches` are extended by the new positions.
        """
        lengths = [_cached(cache) for cache in caches] if caches else [0] * len(rows)
        states = [self._embedding.rows(ids)[None] for ids in rows]
        ropes = [rope_tables(self.config, past, past + len(ids)) for past, ids in zip(lengths, rows, strict=True)]
        for block in self._blocks():

            def step(i: int, block: Block = block, states: list[Tensor] = states) -> Tensor:
                cache = caches[i][block.layer] if caches else None
                return block.forward(states[i], ropes[i], cache)

            states = self._pool.map(step, range(len(rows))) if self._pool else [step(i) for i in range(len(rows))]
            tick()
        return [rms_norm(state[0], self._norm, self.config.rms_norm_eps) for state in states]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[tokens, vocab]` of normed hidden states; the head is converted in pieces."""
        return self._head.logits(hidden)

    @torch.no_grad()
    def step(self, ids: NDArray, caches: Caches) -> Tensor:
        """Append `ids` `[batch, tokens]` to sequences of one length.

        Returns the logits `[batch, vocab]` of the next token.
        """
        past = _cached(caches)
        state = self._embedding.rows(ids)
        rope = rope_tables(self.config, past, past + ids.shape[1])
        for block in self._blocks():
            state = block.forward(state, rope, caches[block.layer])
        return self.logits(rms_norm(state[:, -1], self._norm, self.config.rms_norm_eps))

    def greedy(self, prompts: Sequence[NDArray], count: int) -> list[NDArray]:
        """The `count` most likely next tokens of each prompt, all prompts in step."""
        caches = [self.new_caches() for _ in prompts]
        rows, texts = list(prompts), [np.empty(0, np.int64) for _ in prompts]
        for _ in range(count):
            last = torch.cat([state[-1:] for state in self.hidden(rows, caches)])
            rows = list(self.logits(last).argmax(-1, keepdim=True).numpy())
            texts = [np.concatenate([text, row]) for text, row in zip(texts, rows, strict=True)]
        return texts


def _cached(caches: Caches) -> int:
    keys = caches[0].keys
    return 0 if keys is None else keys.shape[-2]
