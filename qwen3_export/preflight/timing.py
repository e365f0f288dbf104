"""An estimate of a recipe's time on this machine, from a trial.

The recipe runs on one block of the model's kind, narrowed where it is wide. The trial's seconds by kind of work
(`Workers.seconds`) are scaled with the units of that kind in the model's blocks (`preflight.work`). Two rates are timed
by themselves, on a wide matrix: of products with H, and of factors. Embedding and head, if the recipe quantizes them,
are timed on some of their rows.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.disk import naming_full
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config
from qwen3_export.core.recipe import Recipe
from qwen3_export.preflight.trial import Trial, as_starved, narrowed, random_samples, run_trial, write_block
from qwen3_export.preflight.work import EXPERTS, Solving, block_work, rows_work
from qwen3_export.solve.chunk_sizes import ROWS_AT_ONCE
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.method import fold_of
from qwen3_export.solve.methods import load_method
from qwen3_export.text.samples import Samples

# Samples of the trial, and of one before it that loads what is compiled.
_SAMPLES, _FEW = 16, 4
# Python, torch and compiled loops until they are ready, and without torch; bytes a second of reading, hashing and
# writing what stays.
_START_SECONDS, _PLAIN_START_SECONDS, _BYTES_PER_SECOND = 4.0, 0.7, 1e9
# The matrices that are timed, and how often.
_PROBED, _TURNS = 3072, 2


@dataclass(frozen=True)
class Rates:
    """Seconds of a multiplication: in products with H, and in factors.

    All `threads` make products together, and one makes a factor.
    """

    product: float
    factor: float
    threads: int = 1


def estimate_seconds(
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: Samples | None,
    settings: QuantizeSettings,
    progress: Progress,
    nodes: int = 1,
) -> float:
    """Seconds that `quantize` would take here, from trials of a few seconds.

    Of several `nodes` like this one each does an equal part of the blocks, which is the best case.
    """
    from qwen3_export.solve.setup import runs_without_torch

    config, outer = checkpoint.config, {EMBEDDING, HEAD} & {rule.match for rule in recipe.rules if rule.scheme}
    inner = replace(recipe, rules=tuple(rule for rule in recipe.rules if rule.match not in (EMBEDDING, HEAD)))
    without_torch = runs_without_torch(checkpoint, recipe, settings)
    with tempfile.TemporaryDirectory(prefix="qwen3-export-plan-") as name, progress.bar("time a block", 4) as tick:
        folder = Path(name)
        with naming_full(folder):
            small = write_block(folder / "block", narrowed(checkpoint.raw_config, config))
        few, more = (random_samples(small, count) if samples else None for count in (_FEW, _SAMPLES))
        starved = as_starved(inner, checkpoint, samples, small, more)
        run_trial(small, starved, few, settings, folder / "warm")
        tick()
        trial = run_trial(small, starved, more, settings, folder / "more")
        tick()
        for_outer = run_trial(small, recipe, more, settings, folder / "outer").total - trial.total if outer else 0.0
        tick()
        rates = Rates(0.0, 0.0) if samples is None else probed(settings)
        tick()
    total = max(0.0, for_outer) * config.vocab_size / small.config.vocab_size
    total += _PLAIN_START_SECONDS if without_torch else _START_SECONDS
    total += sum(entry.end - entry.begin for entry in checkpoint.stored_entries()) / _BYTES_PER_SECOND
    solving = solving_of(recipe, trial.starved)
    blocks = (block_seconds(trial, config, layer, samples, solving, rates) for layer in range(config.num_layers))
    return total + sum(blocks) / nodes


def solving_of(recipe: Recipe, starved: float) -> Solving:
    """What of the recipe decides the kinds of work."""
    method, options = load_method(recipe)
    return Solving.of(
        options, method.needs_original(options), fold_of(options) != "none", method.fisher_samples(options), starved
    )


def block_seconds(
    trial: Trial, config: Qwen3Config, layer: int, samples: Samples | None, solving: Solving, rates: Rates
) -> float:
    """Seconds of one block of the model, from those of the trial's."""
    if samples is None or trial.samples is None:
        return trial.total * _weights(config, layer) / _weights(trial.config, 0)
    was = block_work(trial.config, 0, trial.samples, solving)
    units = block_work(config, layer, samples, solving)
    threads = rates.threads
    parts = {}
    for kind, seconds in kinds_of(trial, threads).items():
        within, name = (EXPERTS, kind.removeprefix(EXPERTS)) if kind.startswith(EXPERTS) else ("", kind)
        if name == "rows":
            # An expert is solved by one thread.
            rate = rates.product * (threads if within else 1)
            old, new = (rows_work(c, n, solving)[kind] for c, n in ((trial.config, 0), (config, layer)))
            parts[kind] = max(0.0, seconds - rate * old[1]) * new[0] / old[0] + rate * new[1]
        elif name == "rest":
            factors = f"{within}factors"
            other = max(0.0, seconds - rates.factor * was[factors])
            grown = _weights(config, layer, within) / _weights(trial.config, 0, within) if within else 1.0
            parts[kind] = other * grown + rates.factor * units[factors]
        else:
            parts[kind] = seconds * units[kind] / was[kind] if was.get(kind) else seconds
    apart = sum(seconds for kind, seconds in parts.items() if kind.startswith(EXPERTS))
    return sum(parts.values()) - apart + apart / threads


def _weights(config: Qwen3Config, layer: int, within: str = "") -> float:
    """Weights of a layer, or of its experts alone."""
    shapes = config.linear_shapes(layer)
    return float(sum(math.prod(shape) for name, shape in shapes.items() if not within or is_expert(name)))


def kinds_of(trial: Trial, threads: int) -> dict[str, float]:
    """The trial's seconds by kind of work.

    `rest` is the remainder of the block, `experts/rest` of its experts. Those of experts are seconds of one thread, the
    others of the clock.
    """
    found = {kind: seconds for kind, seconds in trial.seconds.items() if "/" not in kind}
    experts, rest = found.pop("experts", None), trial.total - sum(found.values())
    if experts is not None:
        within = {kind: seconds for kind, seconds in trial.seconds.items() if kind.startswith(EXPERTS)}
        within = {kind: seconds for kind, seconds in within.items() if kind.count("/") == 1}
        found |= {**within, f"{EXPERTS}rest": max(0.0, threads * experts - sum(within.values()))}
        rest -= experts
    return {**found, "rest": rest}


def probed(settings: QuantizeSettings) -> Rates:
    """Time products of some rows with a wide matrix, and its Cholesky factor."""
    import torch

    from qwen3_export.solve.methods.gptq.columns import multiply
    from qwen3_export.solve.setup import open_pool

    with open_pool(settings, False) as pool:
        random, count = torch.Generator().manual_seed(0), pool.threads.count
        rows = torch.randn(_PROBED, ROWS_AT_ONCE, generator=random).to(settings.device)
        wide = torch.randn(_PROBED, _PROBED, generator=random).to(settings.device)
        wide = wide @ wide.T + _PROBED * torch.eye(_PROBED, device=settings.device)

        def product(_: int) -> float:
            # A number on the CPU, so that a GPU has finished.
            return float(multiply(wide, rows, pool.matmul_dtype)[0, 0])

        def factor(_: int) -> float:
            return float(torch.linalg.cholesky_ex(wide)[0][0, 0])

        def seconds(work: Callable[[int], float], times: int) -> float:
            started = time.perf_counter()
            pool.map(work, range(times))
            return time.perf_counter() - started

        products = min(seconds(product, 2 * count) for _ in range(_TURNS)) / (2 * count)
        factors = min(seconds(factor, 1) for _ in range(_TURNS))
    return Rates(products / (_PROBED**2 * ROWS_AT_ONCE), factors / (_PROBED**3 / 3), count)
