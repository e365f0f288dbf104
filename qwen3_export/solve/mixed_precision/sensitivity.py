"""Sensitivity of each unit: the KL divergence that its quantization alone causes.

One sweep over the blocks measures all units:

    block 0      original ──┬────────────▶ block 1 ──┬────────────▶ … ──▶ logits ──▶ P
                            ├ q,k,v changed ─────────┼────────────▶ … ──▶ logits ──▶ Q, KL(P ‖ Q)
                            ├ o changed ─────────────┼────────────▶ …
                            └ …                      ├ q,k,v changed ▶ …

    1. mean x xᵀ of every linear's inputs, from the calibration samples in the original model
    2. each scheme's error tr(ΔHΔᵀ), from at most `SAMPLED_ROWS` output rows of every linear
    3. the unit solved with one scheme, the probe, in an otherwise original model; from its block on, samples that the
       solver has not seen run through that model beside the original. The part of the error that a target shift will
       compensate is subtracted (`mixed_precision.compensation`)

A quantized embedding has samples of its own from block 0 on; a quantized head is applied to the original's samples
at the end, and a tied matrix does both (`mixed_precision.embedding_units`).

    loss(unit, scheme) = KL(unit, probe) · tr(ΔHΔᵀ)(scheme) / tr(ΔHΔᵀ)(probe)

Where the recipe folds scales (`blocks.fold`), every block is folded before its units are measured, by every eighth
calibration sample and the probes' schemes. Folding does not change what the model computes.

Two blocks are in memory. Hidden states are files of samples `[1, tokens, hidden]` in fp32, one set per unit. In a model
of L blocks a measured sample costs some 2·L forward passes (3.5·L if linears are not fused); a calibration sample costs
one, and 4 (or 9) more where compensation is fitted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import dequantize
from qwen3_export.model.block import Block
from qwen3_export.model.decoder import load_block, rope_tables
from qwen3_export.model.workers import Workers
from qwen3_export.solve.blocks.fold import FoldSite, apply_folds, choose_folds
from qwen3_export.solve.blocks.forward import BlockRun, RunSettings, input_moments, run_stage, start_run
from qwen3_export.solve.calibration.activations import SampleFile, share_samples
from qwen3_export.solve.chunk_sizes import FOLD_EVERY
from qwen3_export.solve.method import LinearGroup, fold_of
from qwen3_export.solve.mixed_precision.compensation import Compensation, fit_compensation, run_compensated
from qwen3_export.solve.mixed_precision.divergence import mean_divergences
from qwen3_export.solve.mixed_precision.embedding_units import (
    SAMPLED_ROWS,
    probe_embedding,
    probe_head,
    run_first_block,
)
from qwen3_export.solve.mixed_precision.study import Study, Variant, at_once, embed_file, hidden_file
from qwen3_export.solve.mixed_precision.units import OUTER, Unit
from qwen3_export.solve.rounding.row_chunks import quadratic_form


@dataclass(frozen=True)
class Sensitivity:
    """KL of the model with one unit stored as `probe`, nats per token.

    `errors` has tr(ΔHΔᵀ) of every scheme.
    """

    unit: Unit
    probe: QuantScheme
    errors: Mapping[QuantScheme, float]
    kl: float

    def loss(self, scheme: QuantScheme | None) -> float:
        """Expected KL of this unit alone in nats per token."""
        if scheme is None or scheme == self.probe:
            return self.kl if scheme else 0.0
        error = self.errors[self.probe]
        return self.kl * self.errors[scheme] / error if error > 0 else 0.0


def steps(study: Study) -> int:
    """How often `measure_sensitivities` calls `tick`.

    For each unit it is once per block from its own on, for the original once per block, and at the end once per sample.
    """
    layers = study.checkpoint.config.num_layers
    return layers + sum(min(layers - unit.layer, layers) for unit in study.schemes) + len(study.held_out)


def measure_sensitivities(study: Study, tick: Callable[[], object] = lambda: None) -> list[Sensitivity]:
    """The sensitivity of every unit of `study.schemes`, in that order.

    Raises what the method raises for inputs or weights that are not finite.
    """
    found: list[Variant] = []
    with ExitStack() as stack:
        before = embed_file(study, "calibration", study.calibration, stack)
        original = embed_file(study, "original", study.held_out, stack)
        ends = {unit.pattern: unit for unit in study.schemes if unit.stage == OUTER}
        probe = probe_embedding(study, ends[EMBEDDING], stack) if EMBEDDING in ends else None
        for layer in range(study.checkpoint.config.num_layers):
            block = load_block(study.checkpoint, layer)
            if (fold := fold_of(study.options)) != "none":
                _fold(fold, study, block, before)
            solved, after = _solve_layer(study, block, before, stack)
            passing = [variant.hidden for variant in found]
            if probe is not None and layer == 0:
                found.append(run_first_block(study, block, probe, before, original))
                tick()
            for unit in solved:
                found.append(_run_variant(study, block, unit, before, original, stack))
                tick()
            for file in [*passing, original]:
                _forward(study, block, file, file)
                tick()
            # Where workers share the files, the slowest may still be about to open them.
            study.pool.barrier()
            before.path.unlink(missing_ok=True)
            for kind in ("states", "fold"):
                if study.pool.is_shared:
                    shutil.rmtree(study.scratch / f"{kind}-{layer - 1}", ignore_errors=True)
            before = after
        if last := ends.get(HEAD):
            found.append(probe_head(study, last, before, original))
        shape = (len(study.held_out), len(study.held_out[0]))
        files = [(variant.hidden, variant.head) for variant in found]
        divergences = mean_divergences(study.checkpoint, original, files, shape, study.pool, tick)
    return [Sensitivity(v.unit, v.probe, v.errors, kl) for v, kl in zip(found, divergences, strict=True)]


@dataclass(frozen=True)
class _SolvedUnit:
    """A unit's tr(ΔHΔᵀ) by scheme, and its weights as the probe, by local name."""

    unit: Unit
    errors: Mapping[QuantScheme, float]
    weights: Mapping[str, Tensor]


def measure_on_worker(
    checkpoint: Checkpoint, method: ModuleType, options: Any, pool: Workers, scratch: Path, request: Any
) -> list[Sensitivity]:
    """As `measure_sensitivities`, of a search that came to a cluster's worker (`cluster.member.SearchRequest`)."""
    schemes, calibration, held_out = request.schemes, request.calibration, request.held_out
    return measure_sensitivities(Study(checkpoint, method, options, schemes, calibration, held_out, pool, scratch))


def _fold(kind: str, study: Study, block: Block, before: SampleFile) -> None:
    """Fold a block's scales as `quantize` does, with every unit stored as its probe."""
    probes = {
        n: schemes[0] for unit, schemes in study.schemes.items() if unit.layer == block.layer for n in unit.shapes
    }
    chosen, some = list[tuple[FoldSite, Tensor]](), range(0, len(study.calibration), FOLD_EVERY)
    run = _start(study, block, before, some)
    with closing(run.states):
        for stage in range(len(block.stages)):
            if stage > 0:
                run_stage(run, stage - 1)
            chosen += choose_folds(kind, block, stage, probes, partial(input_moments, run), study.pool)
    apply_folds(block, chosen, lambda name: study.checkpoint.entry(f"{block_name(block.layer)}.{name}").dtype)


def _start(study: Study, block: Block, before: SampleFile, chosen: Sequence[int] | None = None) -> BlockRun:
    """Start a run of the calibration samples, or of some, at the block's entrance."""
    count, length = len(study.calibration), len(study.calibration[0])
    settings = RunSettings(study.pool, rope_tables(block.config, 0, length), at_once(study))
    kind = "states" if chosen is None else "fold"
    own = SampleFile(before.path, (1, length, block.config.hidden_size))
    return start_run(settings, block, own, study.scratch / f"{kind}-{block.layer}", count, chosen)


def _solve_layer(
    study: Study, block: Block, before: SampleFile, stack: ExitStack
) -> tuple[list[_SolvedUnit], SampleFile]:
    """Solve the units of a block.

    Returns them, and the calibration samples' hidden states after the unquantized block.
    """
    solved, run = [], _start(study, block, before)
    with closing(run.states):
        for stage in range(len(block.stages)):
            hessians = _Hessians(run)
            for unit, schemes in study.schemes.items():
                if (unit.layer, unit.stage) == (block.layer, stage):
                    solved.append(_solve_unit(study, unit, schemes, hessians))
            run_stage(run, stage)
        after = run.states.take("residual")
    stack.callback(after.close)
    return solved, after


def _run_variant(
    study: Study, block: Block, solved: _SolvedUnit, before: SampleFile, original: SampleFile, stack: ExitStack
) -> Variant:
    """Run the measured samples through the block with one unit quantized.

    The part of the error that later linears compensate is subtracted.
    """
    config, unit, compensation = study.checkpoint.config, solved.unit, Compensation()
    changed = Block(config, unit.layer, {**block.weights, **solved.weights})
    if study.method.needs_original(study.options):
        rope, count = rope_tables(config, 0, len(study.calibration[0])), len(study.calibration)
        compensation = fit_compensation(
            block, changed, unit.stage, rope, before.read, count, at_once(study), study.pool
        )
    hidden = hidden_file(study, f"unit-{unit.layer}-{unit.pattern.replace('*', 'N')}", len(study.held_out[0]), stack)
    rope = rope_tables(config, 0, len(study.held_out[0]))

    def one(sample: int) -> None:
        _, output, error = run_compensated(block, changed, compensation, rope, original.read(sample))
        hidden.write(sample, output + error)

    share_samples(study.pool, "variant", one, len(study.held_out), hidden)
    return Variant(unit, study.schemes[unit][0], solved.errors, hidden)


class _Hessians:
    """Hessians of the present stage's inputs: mean x xᵀ `[in, in]`.

    The one of a dense stage is kept, since all its linears share it.
    """

    def __init__(self, run: BlockRun) -> None:
        self.run = run
        self._kept: Tensor | None = None

    def of(self, name: str) -> Tensor:
        """The Hessian of one linear's inputs, by local name."""
        if not is_expert(name) and self._kept is not None:
            return self._kept
        found = input_moments(self.run, name).hessian
        self._kept = None if is_expert(name) else found
        return found


def _solve_unit(study: Study, unit: Unit, schemes: Sequence[QuantScheme], hessians: _Hessians) -> _SolvedUnit:
    """Solve a unit with its probe, and some output rows with every scheme."""
    errors, weights = dict.fromkeys(schemes, 0.0), dict[str, Tensor]()
    for names in unit.sharing_input():
        hessian = hessians.of(names[0])
        full = {name: hessians.run.block.weights[name] for name in names}
        some = {name: weight[:: math.ceil(len(weight) / SAMPLED_ROWS)] for name, weight in full.items()}
        solved = {scheme: _solve(study, unit.layer, some, hessian, scheme) for scheme in schemes}
        for scheme, tensors in solved.items():
            errors[scheme] += sum(quadratic_form(tensors[name] - some[name], hessian) for name in names)
        whole = all(len(some[name]) == len(full[name]) for name in names)
        weights.update(solved[schemes[0]] if whole else _solve(study, unit.layer, full, hessian, schemes[0]))
    return _SolvedUnit(unit, errors, weights)


def _solve(
    study: Study, layer: int, weights: Mapping[str, Tensor], hessian: Tensor, scheme: QuantScheme
) -> dict[str, Tensor]:
    """Weights by local name as a scheme stores them, `[out, in]` in fp32."""
    named = {f"{block_name(layer)}.{name}": weight for name, weight in weights.items()}
    group = LinearGroup(named, dict.fromkeys(named, scheme), hessian)
    solved = study.method.solve(group, study.options, study.pool)
    tensors = (torch.from_numpy(dequantize(item.tensor)) for item in solved.values())
    return dict(zip(weights, tensors, strict=True))


def _forward(study: Study, block: Block, before: SampleFile, after: SampleFile) -> None:
    """Run one file's samples through a block, into another file or back."""
    rope = rope_tables(study.checkpoint.config, 0, len(study.held_out[0]))

    def step(sample: int) -> None:
        after.write(sample, block.forward(before.read(sample), rope))

    share_samples(study.pool, "forward", step, len(study.held_out), after)
