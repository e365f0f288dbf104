"""Fisher information of every linear's outputs y: G = mean g gᵀ.

g = ∂(−log p(label)) / ∂y, where labels are drawn from the original's own predictions. To second order, an error Δy
then costs ½ Δyᵀ G Δy of KL divergence: G says how much the model's answer depends on each output.

    up     hidden states of a few samples before every block are kept on disk
    top    gradient at the last hidden state, through final norm and head, the vocabulary in pieces
    down   block by block: run it again, push the gradient through, add up g gᵀ of every linear

A router's choice has no slope: an error either changes it or does not. On the way down it is smoothed by noise
(`model.routing`), so that an output counts for what it does to later routers, too.

Memory is bounded by one block and the activations of a few samples. Only diagonal pieces of G, of at most 256 output
rows each, are kept: the rest matters little, and files would grow with the square of `out`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import EMBEDDING
from qwen3_export.core.tensorfile import TensorFile, TensorFileWriter
from qwen3_export.model.block import Block, rms_norm
from qwen3_export.model.decoder import Rope, load_block, rope_tables, to_torch
from qwen3_export.model.table import Table
from qwen3_export.model.workers import Workers
from qwen3_export.solve.calibration.activations import SampleFile, write_embeddings
from qwen3_export.solve.calibration.measured_outputs import OF_EXPERTS, measured_rows
from qwen3_export.solve.chunk_sizes import BACK_TOKENS, OUTPUT_PIECE, TOP_TOKENS
from qwen3_export.text.samples import Samples

# Rows of the head that are multiplied at a time; fewer where they are converted first, so that they stay in a cache.
_HEAD_ROWS = 16384
_CONVERTED_ROWS = 1024
# The folder of a finished measurement.
_DONE = "outputs"
# G of looked-up rows, in that folder.
_EMBEDDING = "embedding.safetensors"
# Noise on the router's logits, as a share of their root mean square. Half or twice as much changes little.
ROUTING_NOISE = 0.1


def pieces_of(out_rows: int) -> list[slice]:
    """The output rows of a linear in equal pieces, the last one shorter."""
    length = math.ceil(out_rows / math.ceil(out_rows / OUTPUT_PIECE))
    return [slice(begin, min(begin + length, out_rows)) for begin in range(0, out_rows, length)]


@dataclass(frozen=True)
class FisherInformation:
    """The measured pieces of G, one file per block in `folder`."""

    folder: Path

    def of(self, layer: int, name: str, out_rows: int) -> list[Tensor] | None:
        """Pieces `[n, n]` fp32 of one linear's G, in the order of `pieces_of`.

        `OF_EXPERTS` is what a layer's experts add to the residual stream together. None for an expert's own linear.
        """
        file = TensorFile(self.folder / f"{layer:04d}.safetensors")
        if f"{name}.0" not in file.entries:
            return None
        return [torch.from_numpy(file.read(f"{name}.{i}")) for i in range(len(pieces_of(out_rows)))]

    def of_rows(self) -> Tensor:
        """G `[hidden, hidden]` of a looked-up row.

        An error e of the row costs ½ eᵀ G e for each token that looks it up.
        """
        return torch.from_numpy(TensorFile(self.folder / _EMBEDDING).read("rows"))

    def head_share(self) -> float:
        """The mean of 1 − Σ p² over all tokens.

        An error e of a row of the head costs ½ · mean · (e·x)² for each token that the row predicts.
        """
        return float(TensorFile(self.folder / _EMBEDDING).read("head")[0])

    def tokens(self) -> int:
        """Number of tokens that were measured."""
        return int(TensorFile(self.folder / _EMBEDDING).read("tokens")[0])


def found_fisher(scratch: Path) -> FisherInformation:
    """The finished measurement of a run."""
    return FisherInformation(scratch / _DONE)


@dataclass(frozen=True)
class FisherPass:
    """What one pass through the model and back works on."""

    checkpoint: Checkpoint
    ids: list[np.ndarray]
    seed: int
    pool: Workers
    folder: Path
    device: str

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The type that the pass multiplies in.

        A fast one is good enough, since measuring on few tokens is less precise anyway.
        """
        return self.pool.matmul_dtype if self.device == "cpu" else torch.float32

    def block(self, layer: int) -> Block:
        """A block of the original, ready to run."""
        return load_block(self.checkpoint, layer, self.device).running(self.matmul_dtype)

    def file(self, name: str) -> SampleFile:
        """States `[1, tokens, hidden]` per sample."""
        return SampleFile(self.folder / f"{name}.samples", (1, len(self.ids[0]), self.checkpoint.config.hidden_size))


def measure_fisher(
    checkpoint: Checkpoint, samples: Samples, count: int, seed: int, pool: Workers, scratch: Path, device: str,
    tick: Callable[[], object] = lambda: None,
) -> FisherInformation:  # fmt: skip
    """Measure G of all linears on `count` samples, spread evenly.

    The measurement of an earlier run in the same `scratch` is taken over. `tick` is called twice per block.
    """
    done, working = scratch / _DONE, scratch / f"{_DONE}.new"
    if done.is_dir():
        return found_fisher(scratch)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    chosen = np.linspace(0, len(samples.ids) - 1, min(count, len(samples.ids))).astype(int)
    work = FisherPass(checkpoint, [samples.ids[i] for i in chosen], seed, pool, working, device)
    rope = rope_tables(checkpoint.config, 0, len(work.ids[0]), device)
    _forward(work, rope, tick)
    spread = _loss_gradient(work)
    for layer in reversed(range(checkpoint.config.num_layers)):
        _backward(work, work.block(layer), rope)
        tick()
    _write_embedding(work, spread)
    for path in working.glob("*.samples"):
        path.unlink()
    working.rename(done)
    return FisherInformation(done)


def _forward(work: FisherPass, rope: Rope, tick: Callable[[], object]) -> None:
    file = work.file("0")
    write_embeddings(file, Table(work.checkpoint.read(f"{EMBEDDING}.weight")), work.ids)
    for layer in range(work.checkpoint.config.num_layers):
        block, after = work.block(layer), work.file(str(layer + 1))

        def step(sample: int, block: Block = block, before: SampleFile = file, after: SampleFile = after) -> None:
            after.write(sample, block.forward(before.read(sample).to(work.device), rope))

        work.pool.map(step, range(len(work.ids)))
        file.close()
        file = after
        tick()
    file.close()


def _loss_gradient(work: FisherPass) -> float:
    """Write the gradient at the last hidden state of every sample.

    Returns the mean of 1 − Σ p² over all tokens: how much a logit's error weighs, where it is foretold.
    """
    config = work.checkpoint.config
    norm = to_torch(work.checkpoint.read("model.norm.weight")).float().to(work.device)
    head = to_torch(work.checkpoint.read(work.checkpoint.head))
    hidden, gradient = work.file(str(config.num_layers)), work.file("gradient")

    def one(sample: int) -> float:
        generator = torch.Generator().manual_seed((work.seed << 32) + sample)
        with torch.enable_grad():
            last = hidden.read(sample).to(work.device).requires_grad_()
            normed = rms_norm(last[0], norm, config.rms_norm_eps)
        parts = torch.split(normed.detach(), TOP_TOKENS)
        slopes, spreads = zip(*(_slope(part, head, generator, work.matmul_dtype) for part in parts), strict=True)
        (found,) = torch.autograd.grad(normed, last, torch.cat(slopes))
        gradient.write(sample, found)
        return sum(spreads) / len(normed)

    found = work.pool.map(one, range(len(work.ids)))
    hidden.close()
    gradient.close()
    return sum(found) / len(found)


def _slope(normed: Tensor, head: Tensor, generator: torch.Generator, matmul_dtype: torch.dtype) -> tuple[Tensor, float]:
    """∂(−log p(label)) / ∂normed = (p − label) · head, for tokens `[n, hidden]`.

    Also returns Σ (1 − Σ p²) over these tokens.
    """
    size = _HEAD_ROWS if head.dtype == matmul_dtype else _CONVERTED_ROWS
    cuts = [slice(i, i + size) for i in range(0, len(head), size)]

    def piece(rows: slice) -> Tensor:
        return head[rows].to(normed.device, matmul_dtype)

    logits, inputs = torch.empty(len(normed), len(head), device=normed.device), normed.to(matmul_dtype)
    for rows in cuts:
        logits[:, rows] = inputs @ piece(rows).T
    delta = logits.softmax(-1)
    del logits
    spread = float((1 - delta.square().sum(-1)).sum())
    labels = draw(delta, generator)
    delta.scatter_add_(1, labels, -torch.ones_like(labels, dtype=delta.dtype))
    delta = delta.to(matmul_dtype)
    found = torch.zeros_like(normed)
    for rows in cuts:
        found += delta[:, rows] @ piece(rows)
    return found, spread


def _write_embedding(work: FisherPass, spread: float) -> None:
    """Write what `of_rows` and `head_share` read, from the gradients at the first hidden state."""
    gradient = work.file("gradient")
    parts = work.pool.map(lambda sample: gradient.read(sample)[0], range(len(work.ids)))
    gradient.close()
    tokens = sum(map(len, parts))
    total = torch.stack([part.T @ part for part in parts]).sum(0) / tokens
    arrays = {"rows": total.numpy(), "head": np.array([spread], np.float32), "tokens": np.array([tokens], np.int64)}
    _write(work.folder / _EMBEDDING, arrays)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with TensorFileWriter(path, {name: (array.dtype, array.shape) for name, array in arrays.items()}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def draw(shares: Tensor, generator: torch.Generator) -> Tensor:
    """One label `[n, 1]` from each distribution `[n, vocab]`.

    It inverts the cumulative distribution, which needs one random number per token; torch.multinomial draws one for
    every entry of the vocabulary.
    """
    cumulated = shares.cumsum(-1)
    aim = torch.rand(len(shares), 1, generator=generator).to(shares.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, aim, right=True).clamp_(max=shares.shape[1] - 1)


def _backward(work: FisherPass, block: Block, rope: Rope) -> None:
    """Push the gradients through one block and write its pieces of G."""
    rows = measured_rows(block.config, block.layer)
    names = [name for name in rows if name != OF_EXPERTS]
    totals = {(name, i): torch.zeros(1, device=work.device) for name in rows for i in range(len(pieces_of(rows[name])))}
    hidden, gradient, count = work.file(str(block.layer)), work.file("gradient"), len(work.ids)
    at_once = max(1, BACK_TOKENS // len(work.ids[0]))

    def one(sample: int) -> list[Tensor]:
        own = replace(block, outputs={}, routing_noise=ROUTING_NOISE)
        with torch.enable_grad():
            before = hidden.read(sample).to(work.device).requires_grad_()
            after = own.forward(before, rope)
        assert own.outputs is not None
        behind = gradient.read(sample).to(work.device)
        found = torch.autograd.grad(after, [before, *(own.outputs[n] for n in names)], behind)
        gradient.write(sample, found[0])
        return [part.reshape(-1, part.shape[-1]) for part in (*found[1:], behind)]

    for begin in range(0, count, at_once):
        parts = work.pool.map(one, range(begin, min(begin + at_once, count)))
        slopes = {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(rows)}

        def add(key: tuple[str, int], slopes: dict[str, Tensor] = slopes) -> None:
            part = slopes[key[0]][:, pieces_of(rows[key[0]])[key[1]]]
            totals[key] = totals[key] + part.T @ part

        work.pool.map(add, list(totals))
    hidden.close()
    gradient.close()
    (work.folder / f"{block.layer}.samples").unlink()
    arrays = {f"{name}.{i}": total.cpu().numpy() for (name, i), total in totals.items()}
    _write(work.folder / f"{block.layer:04d}.safetensors", arrays)
