"""`calibrate`: sizes of every linear's inputs, as an importance matrix for llama.cpp.

Samples run through the blocks as in `quantize` (`blocks.forward`), each block as it is stored. An importance matrix is
the diagonal of every linear's Σ x xᵀ, so only squares are added up: the whole matrix would cost far more. For an expert
the squares are those of its own tokens, which are counted.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen3_export import __version__
from qwen3_export.core.architecture import Stage
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.coverage import summarise, summary_of
from qwen3_export.core.disk import check_room
from qwen3_export.core.gguf_types import gguf_name
from qwen3_export.core.imatrix import Imatrix, ImatrixEntry
from qwen3_export.core.outputs import staged_file
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.core.qwen3 import EMBEDDING, block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.working_folders import scratch_folder, working_folder
from qwen3_export.errors import InputError
from qwen3_export.model.block import Block, State
from qwen3_export.model.decoder import load_block, rope_tables
from qwen3_export.model.table import Table
from qwen3_export.model.workers import Workers, workers
from qwen3_export.solve.blocks.forward import BlockRun, RunSettings, run_stage, start_run
from qwen3_export.solve.calibration.activations import SampleFile, SpareFiles, write_embeddings
from qwen3_export.solve.chunk_sizes import samples_at_once
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.preflight import state_bytes
from qwen3_export.solve.quantize import calibration_of, check_device
from qwen3_export.text.documents import source_name
from qwen3_export.text.samples import Samples

# Σ x² `[matrices, inputs]` and the number of tokens `[matrices]`; `matrices` is 1, or the number of experts.
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
# By the name of the tensor in a GGUF file.
Sums = dict[str, Pair]


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
    beside, own = working_folder(output, "states", inputs), scratch_folder(settings.scratch, output, inputs)
    with staged_file(output, settings.force, inputs) as partial, beside as states, own as spilled:
        scratch = spilled or states
        samples = calibration_of(checkpoint, Recipe("calibrate", "rtn", ()), sized, progress)
        hint = "free some room, or give a --scratch on another disk"
        check_room({scratch: state_bytes(checkpoint.config, samples.tokens)}, {scratch: hint})
        with workers(settings.threads, fast=True) as pool:
            sums = _run(checkpoint, samples, settings.device, pool, scratch, progress)
        entries = {
            name: ImatrixEntry(total.astype(np.float32), tokens.astype(np.float32))
            for name, (total, tokens) in sums.items()
        }
        dataset = source_name(settings.calibration)
        made = {
            "version": __version__,
            "source.name": checkpoint.name,
            "source.sha256": checkpoint.sha256,
            "calibration.sha256": samples.sha256,
            "seed": str(settings.seed),
        }
        Imatrix(entries, [dataset], len(samples.ids), length, output.name, made).write(partial)
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
    """Sums over all samples, block after block.

    Hidden states between two blocks are on the disk.
    """
    config, length, found = checkpoint.config, len(samples.ids[0]), Sums()
    rope, spare_files = rope_tables(config, 0, length, device), SpareFiles(scratch / "spare")
    settings = RunSettings(pool, rope, samples_at_once(length), device, spare_files=spare_files)
    hidden = SampleFile(scratch / "embedding.samples", (1, length, config.hidden_size))
    write_embeddings(hidden, Table(checkpoint.linear(EMBEDDING)), samples.ids)
    with progress.bar(f"calibrate on {checkpoint.name}", config.num_layers) as tick:
        for layer in range(config.num_layers):
            block, before = _block(checkpoint, layer, device, pool), hidden
            run = start_run(settings, block, before, scratch / f"states-{layer % 2}", len(samples.ids))
            with closing(run.states):
                for number, stage in enumerate(block.stages):
                    found.update(_stage_sums(run, stage))
                    run_stage(run, number)
                hidden = run.states.take("residual")
            spare_files.put(before.path)
            tick()
    hidden.close(remove=True)
    return found


def _block(checkpoint: Checkpoint, layer: int, device: str, pool: Workers) -> Block:
    """A block in the fastest type that is close enough here."""
    block = load_block(checkpoint, layer, device)
    if device != "cpu" or any(scheme.activations for scheme in checkpoint.schemes.values()):
        return block
    block.matmul_dtype, block.int_matmul = pool.matmul_dtype, pool.int_matmul
    return block.running(pool.matmul_dtype)


def _stage_sums(run: BlockRun, stage: Stage) -> Sums:
    """Sums of the inputs of one stage's linears over all samples.

    Linears that share their inputs share the arrays.
    """
    use, prefix = run.settings, block_name(run.block.layer)

    def one(sample: int) -> Pair:
        state = run.states.read(sample, ("x", "experts"))
        return _sums(stage, {name: tensor.to(use.device) for name, tensor in state.items()})

    total: Pair | None = None
    for begin in range(0, run.states.num_samples, use.samples_at_once):
        some = range(begin, min(begin + use.samples_at_once, run.states.num_samples))
        for squares, tokens in use.pool.map(one, some):
            total = (squares, tokens) if total is None else (total[0] + squares, total[1] + tokens)
    assert total is not None
    if not np.isfinite(total[0]).all():
        raise InputError(
            f"{prefix}.{stage.groups[0][0]}: its inputs hold NaN or infinity, or their squares do",
            "the checkpoint is damaged: compare its hash",
        )
    return dict.fromkeys((f"{gguf_name(f'{prefix}.{name}')}.weight" for name in stage.groups[0]), total)


def _sums(stage: Stage, state: State) -> Pair:
    """Σ x² of one sample's inputs at a stage, and their number."""
    squares = state["x"].float().square()
    if not stage.routed:
        flat = squares.reshape(-1, squares.shape[-1])
        return flat.sum(0).cpu().numpy().astype(np.float64)[None], np.array([float(len(flat))])
    chosen = state["experts"].reshape(-1).cpu()
    if squares.dim() == state["experts"].dim():
        # Inputs before they are sent to experts: each goes to several.
        squares = squares.unsqueeze(-2).expand(*state["experts"].shape, -1)
    flat = squares.reshape(len(chosen), -1).cpu()
    total = torch.zeros(stage.experts, flat.shape[1]).index_add_(0, chosen, flat)
    tokens = torch.bincount(chosen, minlength=stage.experts).double()
    return total.numpy().astype(np.float64), tokens.numpy()
