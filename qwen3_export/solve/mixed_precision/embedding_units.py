"""Embedding and head as units of a search.

The whole matrix is solved with one scheme, the probe, and some of its rows with every scheme.

    embedding   its effect is measured on samples that begin with the quantized embedding, in files of their own
    head        its effect is measured at the end of the original's samples; a tied matrix has both effects

They are solved as in `quantize` (`blocks.embeddings`): an embedding is rounded, a head is solved against its inputs, a
tied matrix against both uses. Only the head's target shift is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import dequantize
from qwen3_export.model.block import Block
from qwen3_export.model.decoder import rope_tables
from qwen3_export.model.table import Table, to_torch
from qwen3_export.model.workers import Workers
from qwen3_export.solve.blocks.embeddings import AHEAD_EVERY, solve_row_chunks, tied_hessian
from qwen3_export.solve.blocks.head_inputs import head_moments
from qwen3_export.solve.calibration.activations import SampleFile, share_samples
from qwen3_export.solve.method import LinearGroup, SolvedWeight
from qwen3_export.solve.mixed_precision.compensation import Compensation, fit_compensation, run_compensated
from qwen3_export.solve.mixed_precision.study import Study, Variant, at_once, embed_file, hidden_file
from qwen3_export.solve.mixed_precision.units import OUTER, Unit
from qwen3_export.solve.rounding.nearest import round_group
from qwen3_export.solve.rounding.row_chunks import quadratic_form

SAMPLED_ROWS = 512


def solve_some_rows(
    method: ModuleType | None, options: Any, pool: Workers, hessian: Tensor | None, scheme: QuantScheme, weight: Tensor
) -> SolvedWeight:
    """Some rows `[n, hidden]` as the method stores them; without one, rounded to nearest."""
    group = LinearGroup({"": weight}, {"": scheme}, hessian)
    return (round_group(group, "mse", pool) if method is None else method.solve(group, options, pool))[""]


def probe_matrix(
    checkpoint: Checkpoint,
    module: str,
    schemes: Sequence[QuantScheme],
    solve: Callable[[QuantScheme, Tensor], SolvedWeight],
    hessian: Tensor | None,
) -> tuple[Table, dict[QuantScheme, float]]:
    """The matrix as the first scheme stores it, and every scheme's error.

    The errors tr(ΔHΔᵀ) are measured on evenly chosen rows.
    """
    out_rows = checkpoint.config.outer_matrices()[module][0]
    weight = checkpoint.linear(module)[:: math.ceil(out_rows / SAMPLED_ROWS)]  # type: ignore[index]  # 16-bit source
    some = to_torch(weight).float()
    errors = {}
    for scheme in schemes:
        delta = torch.from_numpy(dequantize(solve(scheme, some).tensor)) - some
        errors[scheme] = quadratic_form(delta, hessian)
    whole = solve_row_chunks(checkpoint, module, lambda piece: solve(schemes[0], piece), hessian)
    return Table(whole.tensor), errors


@dataclass(frozen=True)
class EmbeddingProbe:
    """A quantized embedding, and the samples that begin with it."""

    variant: Variant
    calibration: SampleFile


def probe_embedding(study: Study, unit: Unit, stack: ExitStack) -> EmbeddingProbe:
    """Quantize the embedding with its probe, and begin samples with it.

    If the head is tied, it is quantized too.
    """
    checkpoint, schemes, hessian = study.checkpoint, study.schemes[unit], None
    tied = checkpoint.config.tie_word_embeddings
    if tied and study.method.needs_inputs(study.options):
        file = hidden_file(study, "ahead", len(study.calibration[0]), stack)
        hessian, _ = tied_hessian(checkpoint, study.calibration[::AHEAD_EVERY], file, study.pool)
        file.path.unlink(missing_ok=True)
    solve = partial(solve_some_rows, study.method if tied else None, study.options, study.pool, hessian)
    table, errors = probe_matrix(checkpoint, unit.pattern, schemes, solve, hessian)
    calibration, held_out = (
        embed_file(study, f"embedding-{name}", samples, stack, table)
        for name, samples in (("solving", study.calibration), ("measured", study.held_out))
    )
    return EmbeddingProbe(Variant(unit, schemes[0], errors, held_out, table if tied else None), calibration)


def run_first_block(
    study: Study, block: Block, probe: EmbeddingProbe, before: SampleFile, original: SampleFile
) -> Variant:
    """Run samples with a quantized embedding through block 0, with compensation."""
    hidden, compensation = probe.variant.hidden, Compensation()
    if study.method.needs_original(study.options):
        rope, count = rope_tables(block.config, 0, len(study.calibration[0])), len(study.calibration)
        compensation = fit_compensation(
            block, block, OUTER, rope, before.read, count, at_once(study), study.pool, probe.calibration.read
        )
    probe.calibration.path.unlink(missing_ok=True)
    rope = rope_tables(block.config, 0, len(study.held_out[0]))

    def one(sample: int) -> None:
        _, output, error = run_compensated(block, block, compensation, rope, original.read(sample), hidden.read(sample))
        hidden.write(sample, output + error)

    share_samples(study.pool, "first block", one, len(study.held_out), hidden)
    return probe.variant


def probe_head(study: Study, unit: Unit, before: SampleFile, original: SampleFile) -> Variant:
    """The original's samples with a quantized head; `before` are calibration states."""
    schemes, hessian = study.schemes[unit], None
    if study.method.needs_inputs(study.options):
        samples, length = range(len(study.calibration)), len(study.calibration[0])
        hessian = head_moments(study.checkpoint, [before], samples, length, study.pool, "cpu").hessian
    solve = partial(solve_some_rows, study.method, study.options, study.pool, hessian)
    table, errors = probe_matrix(study.checkpoint, unit.pattern, schemes, solve, hessian)
    return Variant(unit, schemes[0], errors, original, table)
