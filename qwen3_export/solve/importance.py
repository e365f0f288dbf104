"""`calibrate`: sizes of every linear's inputs, as an importance matrix for llama.cpp.

Samples run through one block after the other, as in `blocks.block`, each block as it is stored. Of every linear's
inputs the squares are added up, of an expert those of its own tokens, and the tokens are counted.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.architecture import Stage
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.coverage import summarise, summary_of
from qwen3_export.core.gguf_types import gguf_name
from qwen3_export.core.imatrix import Entry, Imatrix
from qwen3_export.core.outputs import staged_file, working_folder
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.core.qwen3 import EMBEDDING, block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.model.block import Block, State
from qwen3_export.model.decoder import Rope, load_block, rope_tables
from qwen3_export.model.table import Table
from qwen3_export.model.workers import Workers, workers
from qwen3_export.solve.calibration.activations import SampleFile
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import calibration_of, check_device
from qwen3_export.text.documents import source_name
from qwen3_export.text.samples import Samples

# Σ x² `[matrices, inputs]` and tokens `[matrices]` of a tensor.
Sums = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def calibrate(
    checkpoint: Checkpoint, output: Path, settings: QuantizeSettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Write an importance matrix in llama.cpp's GGUF form; returns the result that `--json` prints.

    The sums are made sample by sample and added in their order, so the bytes do not depend on `threads`.
    """
    progress, started = progress or Progress(), time.monotonic()
    check_device(settings.device)
    inputs = (checkpoint.folder, settings.calibration)
    count, length = settings.samples or 128, settings.sequence_length or 512
    sized = replace(settings, samples=count, sequence_length=length)
    with staged_file(output, settings.force, inputs) as partial, working_folder(output, "states", inputs) as scratch:
        samples = calibration_of(checkpoint, Recipe("calibrate", "rtn", ()), sized, progress)
        with workers(settings.threads, fast=True) as pool:
            sums = _run(checkpoint, samples, settings.device, pool, scratch, progress)
        entries = {
            name: Entry(total.astype(np.float32), tokens.astype(np.float32)) for name, (total, tokens) in sums.items()
        }
        dataset = source_name(settings.calibration)
        Imatrix(entries, [dataset], len(samples.ids), length, output.name).write(partial)
    return {
        "output": str(output),
        "source_sha256": checkpoint.sha256,
        "calibration_sha256": samples.sha256,
        "seed": settings.seed,
        "samples": len(samples.ids),
        "sequence_length": length,
        "tokens": samples.tokens,
        "tensors": len(entries),
        "experts": _experts(checkpoint, sums),
        "bytes": output.stat().st_size,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _experts(checkpoint: Checkpoint, sums: Sums) -> dict[str, Any] | None:
    """How well the text reached the experts; None for a model without them."""
    config = checkpoint.config
    tokens = {
        block_name(layer): [int(n) for n in sums[f"blk.{layer}.ffn_down_exps.weight"][1]]
        for layer in config.sparse_layers
    }
    return summary_of(summarise(tokens, 1, "share"))


def _run(
    checkpoint: Checkpoint, samples: Samples, device: str, pool: Workers, scratch: Path, progress: Progress
) -> Sums:
    """All samples through all blocks.

    Their hidden states are on the disk between two blocks.
    """
    config, length = checkpoint.config, len(samples.ids[0])
    hidden, found = SampleFile(scratch / "hidden.samples", (1, length, config.hidden_size)), Sums()
    table = Table(checkpoint.linear(EMBEDDING))
    try:
        for place, ids in enumerate(samples.ids):
            hidden.write(place, table.rows(ids)[None])
        del table
        rope = rope_tables(config, 0, length, device)
        with progress.bar(f"calibrate on {checkpoint.name}", config.num_layers) as tick:
            for layer in range(config.num_layers):
                block = _block(checkpoint, layer, device, pool)

                def step(place: int, block: Block = block) -> Sums:
                    return _pass(block, hidden, place, rope, device)

                for part in pool.map(step, range(len(samples.ids))):
                    _add(found, part)
                tick()
    finally:
        hidden.close(remove=True)
    return found


def _block(checkpoint: Checkpoint, layer: int, device: str, pool: Workers) -> Block:
    """A block in the fastest type that is close enough here."""
    block = load_block(checkpoint, layer, device)
    if device != "cpu" or any(scheme.activations for scheme in checkpoint.schemes.values()):
        return block
    block.matmul_dtype, block.int_matmul = pool.matmul_dtype, pool.int_matmul
    return block.running(pool.matmul_dtype)


def _pass(block: Block, hidden: SampleFile, place: int, rope: Rope, device: str) -> Sums:
    """One sample through a block: the sums of its inputs at every stage.

    What leaves the block replaces it.
    """
    state, found = block.initial_state(hidden.read(place).to(device)), Sums()
    for number, stage in enumerate(block.stages):
        found.update(_sums(block, stage, state))
        state = block.advance(number, state, rope)
    hidden.write(place, state["residual"])
    return found


def _sums(block: Block, stage: Stage, state: State) -> Sums:
    """Σ x² of what the linears of a stage take in.

    Linears that share their inputs share the arrays.
    """
    squares, prefix = state["x"].float().square(), block_name(block.layer)
    tensors = dict.fromkeys(f"{gguf_name(f'{prefix}.{name}')}.weight" for name in stage.groups[0])
    if not stage.routed:
        total = _sum(squares)[None]
        return dict.fromkeys(tensors, (total.numpy().astype(np.float64), np.array([float(squares[..., 0].numel())])))
    chosen, experts = state["experts"].reshape(-1), stage.experts
    if squares.dim() == state["experts"].dim():
        # Inputs before they are sent to experts: each goes to several.
        squares = squares.unsqueeze(-2).expand(*state["experts"].shape, -1)
    flat = squares.reshape(len(chosen), -1)
    total = torch.zeros(experts, flat.shape[1]).index_add_(0, chosen.cpu(), flat.cpu())
    tokens = torch.bincount(chosen.cpu(), minlength=experts).double()
    return dict.fromkeys(tensors, (total.numpy().astype(np.float64), tokens.numpy()))


def _sum(squares: Tensor) -> Tensor:
    """Over all tokens `[inputs]`."""
    return squares.reshape(-1, squares.shape[-1]).sum(0).cpu()


def _add(found: Sums, part: Sums) -> None:
    """Add one sample's sums, in fp64."""
    for name, (total, tokens) in part.items():
        before = found.get(name)
        found[name] = (total, tokens) if before is None else (before[0] + total, before[1] + tokens)
