"""`recipes search`: the mixed-precision recipe that loses least within a size budget.

    sensitivity   KL that each unit causes alone            `mixed_precision.sensitivity`
    budget        min Σ KL  subject to  Σ bits ≤ target     `mixed_precision.knapsack`
    recipe        one rule per unit that differs from the most common scheme

How well the sum of single KLs foretells the KL of the whole: for ten recipes of the reference model, six
of them random mixes of 3, 4 and 8 bits, KL / sum was 0.87 to 0.92, the rank correlation 0.99.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3_export.cluster.session import check_cluster
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import HEAD
from qwen3_export.core.recipe import Recipe, Rule, load_recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.units import binary_size
from qwen3_export.errors import InputError, ResourceError
from qwen3_export.model.workers import workers
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.methods import load_method
from qwen3_export.solve.mixed_precision.candidates import (
    GROUPS,
    fitting,
    gguf_outer,
    is_gguf,
    one_of,
    options_recipe,
    probe_first,
    schemes,
)
from qwen3_export.solve.mixed_precision.knapsack import Choice, choose
from qwen3_export.solve.mixed_precision.result import SearchResult
from qwen3_export.solve.mixed_precision.sensitivity import (
    Sensitivity,
    measure_on_worker,
    measure_sensitivities,
    steps,
)
from qwen3_export.solve.mixed_precision.study import Study
from qwen3_export.solve.mixed_precision.units import OUTER, Unit, units
from qwen3_export.solve.preflight import memory_needed
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import Samples, calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer

# SmoothQuant's is for rounded activations, which no candidate has.
FOLDS = ("none", "awq")
_MEASURED_TOKENS = 256


@dataclass(frozen=True)
class SearchSettings:
    """What to search; everything but `threads` can change the recipe.

    `target_bpw` counts the decoder's linears, scales and zero points included, and with `embeddings` also
    the embedding and the head, which are then quantized too, a tied one once. `grids` are names of
    `candidates.GRIDS`; 8 bits are always symmetric, in groups of 128 where that fits. `bits` None takes what is
    usual for the grids. `measure` is the number
    of samples, of at most 256 tokens each, that the KL is measured on and no solver sees. `fused` gives
    q,k,v of a block one scheme and gate,up one, which vLLM and SGLang need. `fold` is one of `FOLDS`;
    None folds where the method looks at inputs anyway: it costs little, and is left out where it does not pay.
    `groups` are the sizes of groups that are tried below 8 bits. `by_kind` gives linears of a kind one scheme in all
    blocks, so that the recipe fits other models too.
    """

    target_bpw: float
    bits: tuple[int, ...] | None = None
    grids: tuple[str, ...] = ("signed", "asymmetric")
    method: str = "gptq"
    calibration: str = "bundled"
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    measure: int = 16
    fused: bool = False
    threads: int | None = None
    embeddings: bool = False
    fold: str | None = None
    cluster: str | None = None
    groups: tuple[int, ...] = GROUPS
    by_kind: bool = False


def search(
    checkpoint: Checkpoint, settings: SearchSettings, scratch: Path, progress: Progress | None = None
) -> SearchResult:
    """Measure, solve the budget, and return the recipe.

    Hidden states lie in a folder below `scratch` meanwhile.

    Raises InputError before the long work when the budget is out of reach or the text too short, and
    ResourceError when `scratch` has too little room.
    """
    progress, started = progress or Progress(), time.monotonic()
    if settings.cluster is not None:
        check_cluster(settings.cluster)
    if checkpoint.is_quantized:
        raise InputError(f"{checkpoint.folder} is quantized already", "give the 16-bit original")
    base = _base(settings)
    method, options = load_method(base)
    tried = schemes(settings.grids, settings.bits, settings.groups)
    options_of = {unit: fitting(unit, tried) for unit in units(checkpoint.config, settings.fused, settings.embeddings)}
    capacity = _capacity(options_of, settings.target_bpw)
    calibration, held_out = _samples(checkpoint, settings)
    _check_disk(checkpoint, len(options_of), calibration, held_out, scratch)
    with tempfile.TemporaryDirectory(prefix=".search-", dir=scratch) as folder, workers(settings.threads) as pool:
        probed = {unit: probe_first(unit, found, settings.target_bpw) for unit, found in options_of.items()}
        study = Study(checkpoint, method, options, probed, calibration, held_out, pool, Path(folder))
        if settings.cluster is not None:
            measured = _on_nodes(study, base, settings, settings.cluster, progress)
        else:
            with progress.bar(f"search {checkpoint.name}", steps(study)) as tick:
                measured = measure_sensitivities(study, tick)
    chosen = _choose(measured, options_of, capacity, settings.by_kind)
    for sensitivity, scheme in chosen:
        label = scheme.label if scheme else "16 bits"
        progress.log(f"{sensitivity.unit.match}  KL {sensitivity.kl:.2e} at {sensitivity.probe.label}  → {label}")
    return SearchResult(_recipe(checkpoint, settings, base, chosen), tuple(chosen), time.monotonic() - started)


def _on_nodes(
    study: Study, base: Recipe, settings: SearchSettings, address: str, progress: Progress
) -> list[Sensitivity]:
    """The same by workers on a cluster, which share the work on every block."""
    from qwen3_export.solve.cluster import Run, SearchRequest, open_cluster

    samples = Samples(tuple(study.calibration), ("",) * len(study.calibration))
    original = study.method.needs_original(study.options)
    needed = memory_needed(study.checkpoint.config, samples, original, outer=settings.embeddings)
    folder, source = study.scratch.absolute(), study.checkpoint.folder.absolute()
    run = Run(source, base, None, QuantizeSettings(threads=settings.threads), folder, folder, base.layout, False, False)
    request = SearchRequest(study.schemes, study.calibration, study.held_out, measure_on_worker)
    with progress.bar(f"search {study.checkpoint.name} on a cluster", 1) as tick:
        with open_cluster(address, run, needed, study.checkpoint, progress) as cluster:
            found = cluster.search(request)
        tick()
    return found


def _base(settings: SearchSettings) -> Recipe:
    """The recipe whose method and options are searched with."""
    base = load_recipe(options_recipe(settings.method, settings.grids))
    usual = "none" if settings.method == "rtn" else "awq"
    fold = usual if settings.fold is None else one_of("--fold", settings.fold, FOLDS)
    return replace(base, options={**base.options, "fold": fold}, file_type="")


def _capacity(candidates: dict[Unit, list[QuantScheme | None]], target: float) -> int:
    """The budget in bits.

    InputError with the smallest and largest possible when it is out of reach.
    """
    weights = sum(unit.weights for unit in candidates)
    sizes = [[unit.bits(scheme) for scheme in found] for unit, found in candidates.items()]
    least, most = (sum(map(pick, sizes)) / weights for pick in (min, max))
    if not least <= target <= most:
        raise InputError(
            f"--target-bpw {target:g}: the candidates allow {least:.4g} to {most:.4g} bits per weight",
            "other --bits (2, 3, 4, 8, 16) allow other sizes",
        )
    return math.floor(target * weights)


def _samples(checkpoint: Checkpoint, settings: SearchSettings) -> tuple[list[Any], list[Any]]:
    """Rows that `quantize` will calibrate on, and further ones, cut short, to measure on."""
    length = settings.sequence_length
    if length > checkpoint.config.max_position:
        raise InputError(f"--sequence-length {length}: the model has {checkpoint.config.max_position} positions")
    tokenizer, documents = ModelTokenizer(checkpoint.folder), load_documents(settings.calibration)
    samples: Samples = calibration_samples(
        tokenizer, documents, settings.samples + settings.measure, length, settings.seed
    )
    if max(int(ids.max()) for ids in samples.ids) >= checkpoint.config.vocab_size:
        raise InputError(f"{checkpoint.folder}: the tokenizer has more tokens than the model's vocabulary")
    chosen = _to_measure(len(samples.ids), settings)
    held_out = [samples.ids[i][:_MEASURED_TOKENS] for i in chosen]
    return [ids for i, ids in enumerate(samples.ids) if i not in chosen], held_out


def _to_measure(count: int, settings: SearchSettings) -> list[int]:
    """Which of `count` samples the KL is measured on.

    They are those after `samples`, or a part of a text that is too short.
    """
    if count == settings.samples + settings.measure:
        return list(range(settings.samples, count))
    number = min(settings.measure, count // 4)
    if number == 0:
        raise InputError(
            f"the calibration text gives {count} samples of {settings.sequence_length} tokens, at least 4 are needed",
            "give more text, or a smaller --sequence-length",
        )
    return [(2 * i + 1) * count // (2 * number) for i in range(number)]


def _check_disk(checkpoint: Checkpoint, count: int, calibration: list[Any], held_out: list[Any], scratch: Path) -> None:
    """Raise ResourceError when the hidden states will not fit on the disk."""
    config = checkpoint.config
    shapes = [shape for layer in range(config.num_layers) for shape in config.linear_shapes(layer).values()]
    widest = max(shape[1] for shape in shapes) * max(config.experts_per_token, 1)
    # Before and after a block, in it, and before the first one once more with a quantized embedding.
    calibrating = sum(map(len, calibration)) * (5 * config.hidden_size + 2 * widest)
    passing = sum(map(len, held_out)) * config.hidden_size * (count + 1)
    needed, free = 4 * (calibrating + passing), shutil.disk_usage(scratch).free
    if needed > free:
        raise ResourceError(
            f"{scratch}: about {binary_size(needed)} are needed, {binary_size(free, up=False)} are free",
            "free some room, or write --output to another disk",
        )


def _choose(
    measured: list[Sensitivity], candidates: Mapping[Unit, list[QuantScheme | None]], capacity: int, by_kind: bool
) -> list[tuple[Sensitivity, QuantScheme | None]]:
    """Every unit's scheme."""
    groups: dict[str, list[Sensitivity]] = {}
    for sensitivity in measured:
        groups.setdefault(sensitivity.unit.kind if by_kind else sensitivity.unit.match, []).append(sensitivity)
    # Linears of one kind have one shape, and so the same candidates.
    tried = [candidates[found[0].unit] for found in groups.values()]
    choices = [
        [Choice(sum(s.unit.bits(scheme) for s in found), sum(s.loss(scheme) for s in found)) for scheme in options]
        for found, options in zip(groups.values(), tried, strict=True)
    ]
    picks = choose(choices, capacity)
    assert picks is not None  # the smallest choices fit: `_capacity` has seen to it
    chosen = {key: options[pick] for key, options, pick in zip(groups, tried, picks, strict=True)}
    return [(s, chosen[s.unit.kind if by_kind else s.unit.match]) for s in measured]


def _recipe(
    checkpoint: Checkpoint, settings: SearchSettings, base: Recipe, chosen: list[tuple[Sensitivity, QuantScheme | None]]
) -> Recipe:
    """The scheme of most weights for all, rules for the units that differ."""
    weights: dict[QuantScheme | None, int] = {}
    inner = [(s, scheme) for s, scheme in chosen if s.unit.stage != OUTER]
    for sensitivity, scheme in inner:
        weights[scheme] = weights.get(scheme, 0) + sensitivity.unit.weights
    usual = max(weights, key=lambda scheme: weights[scheme])
    # No wildcard reaches embedding and head.
    rules = [Rule(s.unit.match, scheme) for s, scheme in chosen if s.unit.stage == OUTER and scheme]
    if settings.by_kind and checkpoint.config.tie_word_embeddings:
        rules += [Rule(HEAD, rule.scheme) for rule in rules]
    if is_gguf(settings.grids) and not settings.embeddings:
        rules += [Rule(module, scheme) for module, scheme in gguf_outer(checkpoint.config).items()]
    named = [(s.unit.kind if settings.by_kind else s.unit.match, scheme) for s, scheme in inner if scheme != usual]
    rules += [Rule(match, scheme) for match, scheme in dict.fromkeys(named)]
    bits = sum(s.unit.bits(scheme) for s, scheme in chosen) / sum(s.unit.weights for s, _ in chosen)
    counted = "weight of linears, embedding and head" if settings.embeddings else "decoder weight"
    return Recipe(
        name=f"{checkpoint.name}-mixed-{settings.target_bpw:g}bpw",
        method=base.method,
        rules=(*rules, Rule("*", usual)),
        description=f"mixed precision for {checkpoint.name}, {bits:.3f} bits per {counted}, found by search"
        + (", the same in all layers" if settings.by_kind else "")
        + ("" if settings.fused else "; q, k, v and gate, up may differ, which vLLM refuses"),
        options=base.options,
        calibration={"samples": settings.samples, "sequence_length": settings.sequence_length},
        layout=base.layout,
    )
