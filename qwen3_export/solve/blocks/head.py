"""The output head of an untied model, where the recipe names it.

It is solved like any linear, as the last step, on what the quantized blocks hand on. Where the recipe folds, scales
move between the final norm and the head's columns first. That also makes its inputs more even, which runtimes round to
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import FINAL_NORM, HEAD
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.model.table import to_torch
from qwen3_export.solve.blocks.embeddings import solve_row_chunks
from qwen3_export.solve.blocks.fold import ROWS_TRIED, divide_norm, search_head_scales
from qwen3_export.solve.blocks.head_inputs import final_norm, head_moments, head_sample
from qwen3_export.solve.blocks.paired import paired_inputs
from qwen3_export.solve.calibration.activations import SampleFile
from qwen3_export.solve.calibration.experts import LinearInputs
from qwen3_export.solve.chunk_sizes import FOLD_EVERY
from qwen3_export.solve.job import ORIGINAL, Job, SolvedBlock, SolvedLinear
from qwen3_export.solve.method import LinearGroup, SolvedWeight

# Calibration samples whose rounding to bytes speaks for all.
_SAMPLES = 8


def solve_head(job: Job) -> SolvedBlock | None:
    """Solve an untied head; None when it stays in 16 bits or is tied.

    With calibration samples, their hidden states after the last block must be in the job's scratch folder. A final norm
    that a fold has changed is among `replaced`.
    """
    scheme = job.recipe.scheme_for(HEAD)
    if scheme is None or job.checkpoint.config.tie_word_embeddings:
        return None
    if job.samples is None:
        return SolvedBlock({HEAD: _solve(job, scheme, None, None)})
    with ExitStack() as stack:
        paths = [job.hidden_path(job.checkpoint.config.num_layers, stream) for stream in job.models]
        files = [stack.enter_context(closing(job.hidden_file(path))) for path in paths]
        norm, columns, replaced = _fold(job, scheme, files[0])
        inputs = _inputs(job, files, norm)
    return SolvedBlock({HEAD: _solve(job, scheme, inputs, columns)}, replaced)


def _solve(job: Job, scheme: QuantScheme, inputs: LinearInputs | None, columns: Tensor | None) -> SolvedLinear:
    hessian, paired, peak, tokens = None, None, 0.0, 0
    if inputs is not None:
        hessian, paired, tokens = inputs.moments.hessian, inputs.paired, inputs.tokens
        peak = 0.0 if inputs.moments.peak is None else float(inputs.moments.peak.max())

    def solve(weight: Tensor) -> SolvedWeight:
        group = LinearGroup({HEAD: weight}, {HEAD: scheme}, hessian, tokens, paired, peak)
        return job.method.solve(group, job.options, job.pool)[HEAD]

    return SolvedLinear(solve_row_chunks(job.checkpoint, HEAD, solve, hessian, job.device, columns), tokens)


def _fold(job: Job, scheme: QuantScheme, file: SampleFile) -> tuple[Tensor, Tensor | None, dict[str, NDArray]]:
    """The final norm `[hidden]`, factors of the head's columns, the norm as stored.

    Without a fold the latter are None and empty.
    """
    checkpoint, norm = job.checkpoint, final_norm(job.checkpoint, job.device)
    assert job.samples is not None
    if job.fold != "awq":
        return norm, None, {}
    some, length = range(0, len(job.samples.ids), FOLD_EVERY), len(job.samples.ids[0])
    moments = head_moments(checkpoint, [file], some, length, job.pool, job.device)
    eps = checkpoint.config.rms_norm_eps
    inputs = [head_sample([file], {}, norm, eps, job.device, sample).x for sample in some[:_SAMPLES]]
    scales = search_head_scales(_some_rows(checkpoint, job.device), inputs, scheme, moments, job.pool)
    if scales is None:
        return norm, None, {}
    array, divided, columns = divide_norm(norm, scales, checkpoint.entry(FINAL_NORM).dtype)
    return divided, columns, {FINAL_NORM: array}


def _some_rows(checkpoint: Checkpoint, device: str) -> Tensor:
    """Rows `[some, hidden]` that speak for all."""
    rows = checkpoint.config.outer_matrices()[HEAD][0]
    places = range(0, rows, -(-rows // ROWS_TRIED))
    return to_torch(np.concatenate([checkpoint.rows(f"{HEAD}.weight", i, i + 1) for i in places])).float().to(device)


def _inputs(job: Job, files: Sequence[SampleFile], norm: Tensor) -> LinearInputs:
    """Moments of the head's inputs after the quantized blocks.

    They are paired where the original runs beside.
    """
    assert job.samples is not None
    eps, length = job.checkpoint.config.rms_norm_eps, len(job.samples.ids[0])
    if len(files) > 1:
        places = {sample: place for place, sample in enumerate(job.samples_of(ORIGINAL))}
        samples = [partial(head_sample, some, places, norm, eps, job.device) for some in (files, files[:1])]
        return paired_inputs(job, samples, job.checkpoint.config.hidden_size)
    moments = head_moments(job.checkpoint, files, range(len(job.samples.ids)), length, job.pool, job.device, norm)
    return LinearInputs(moments, moments.tokens)
