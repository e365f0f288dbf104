"""Simulates the largest models on up to 64 nodes, from measured task times.

Rates (seconds per unit of work on one core) come from the runs on one node. A layer is a sequence of shared tasks; each
ends when its slowest node is done and its bytes have been through the store:

    pieces ─▶ nodes, as evenly as whole pieces allow ─▶ cores of a node, as many as a piece can use
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.scale.models import MODELS
from qwen3_export.core.architecture import is_expert
from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.solve.chunk_sizes import ROUTED_TOKENS

# What is measured: narrow slices of a dense model and of a mixture of experts.
NARROW = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 8192}
SLICES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("8B", {**NARROW, "intermediate_size": 3072}),
    "moe": ("30B-A3B", {**NARROW, "num_key_value_heads": 4, "moe_intermediate_size": 384, "num_experts": 32}),
}
ROWS, LENGTH = 128, 512
# Assumed, not measured: cores of a node, each as fast as the one measured; bytes per second of its link, of the store.
CORES, LINK, STORE = 16, 1.25e9, 5e9
NODES = (1, 2, 4, 8, 16, 32, 64)
STRIP, CHUNK, TOGETHER = 256, 512, 4
# Scales that a fold tries at each place, and the experts that it looks at (`solve.blocks.fold`).
SCALES, EXPERTS_TRIED = 21, 8


@dataclass(frozen=True)
class Share:
    """A shared task: its pieces, their units and cores, and the bytes that move."""

    label: str
    pieces: int
    units: float
    cores: int
    moved: float
    read_by_each: float = 0.0


def shares(config: Qwen3Config, tokens: int) -> Iterator[Share]:
    """The shared tasks of a layer, in order."""
    shapes, length = config.linear_shapes(0), LENGTH
    samples = max(1, tokens // length)
    for stage in config.block(0).stages:
        groups, own = stage.groups, [shapes[name] for name in stage.groups[0]]
        width, out = own[0][1], sum(shape[0] for shape in own)
        # One place before a norm's linears, one before each that writes to the residual stream.
        tried = len(own) * min(len(groups), EXPERTS_TRIED) if not stage.writes_residual else 1
        for _ in range(len(groups) if stage.writes_residual else 1):
            yield Share("fold", SCALES, tried * width * width, 1, 0.0)
        if stage.routed:
            share = config.experts_per_token / config.num_experts
            unit = tokens * share * width * width / 2 + out * width * width
            codes = len(groups) * out * width * 1.06
            yield Share("experts", len(groups), unit, max(1, out // CHUNK), codes, codes)
            steps = math.ceil(tokens / ROUTED_TOKENS)
            work = tokens * config.experts_per_token * out * width / steps
            yield Share("advance", steps, work, 1, tokens * config.experts_per_token * (width + out) * 2)
            continue
        strips = math.ceil(width / STRIP)
        squares = 2.0 * width * width
        unit = tokens * width * width / 2 / math.ceil(strips / 2)
        yield Share("moments", math.ceil(strips / 2), unit, 2, squares, squares + 2.0 * tokens * width)
        chunks = math.ceil(out / CHUNK)
        yield Share("rows", chunks, out * width * width / chunks, 1, 1.06 * out * width, 1.06 * out * width)
        pieces = math.ceil(samples / TOGETHER)
        yield Share("advance", pieces, tokens * out * width / pieces, TOGETHER, tokens * (width + out) * 2)


def own_units(config: Qwen3Config) -> float:
    """Units of unshared work: every node reads the weights and factorises the Hessians."""
    shapes = config.linear_shapes(0)
    widths = {width for name, (_, width) in shapes.items() if not is_expert(name)}
    weights = sum(math.prod(shape) for name, shape in shapes.items() if not is_expert(name))
    return weights * 64 + sum(width**3 for width in widths)


def rates(run: Mapping[str, Any], config: Qwen3Config, tokens: int, layers: int) -> dict[str, float]:
    """Seconds per unit of each kind of work, from a one-core run."""
    worker, units = run["workers"][0], dict[str, float]()
    for share in shares(config, tokens):
        units[share.label] = units.get(share.label, 0.0) + share.pieces * share.units
    shared = {label: sum(item[key] for key in ("working", "waiting", "writing", "reading"))
              for label, item in worker["shared"].items()}  # fmt: skip
    found = {label: worker["shared"][label]["working"] / layers / total for label, total in units.items()}
    # What is not shared is done by every node; `routing` and `keep` are shared but take no time.
    alone = worker["seconds"] - sum(shared.values())
    return {**found, "own": max(0.0, alone) / layers / own_units(config)}


def layer_seconds(config: Qwen3Config, rate: Mapping[str, float], nodes: int) -> dict[str, float]:
    """Seconds of one layer by kind of work.

    `store` and `link` are the seconds by which moving bytes takes longer than the work.
    """
    spent: dict[str, float] = {"own": own_units(config) * rate["own"] / CORES}
    for share in shares(config, ROWS * LENGTH):
        seconds, here = share.units * rate[share.label], math.ceil(share.pieces / nodes)
        work = max(here * seconds / min(CORES, here * share.cores), seconds / min(share.cores, CORES))
        store = (2 * share.moved + nodes * share.read_by_each) / STORE
        link = (2 * share.moved / nodes + share.read_by_each) / LINK
        for name, value in ((share.label, work), ("store", store - work), ("link", link - max(work, store))):
            spent[name] = spent.get(name, 0.0) + max(0.0, value)
    return spent


def curve(found: Mapping[str, Mapping[str, Any]], tokens: int, layers: int) -> list[str]:
    """The report's section on the simulation."""
    base, more = SLICES["moe"]
    measured = parse_config({**MODELS[base].config, **more, "num_hidden_layers": layers}, base)
    rate = rates(found["moe"]["1"], measured, tokens, layers)
    lines = [
        "## The largest models, by simulation", "",
        f"Rates of the moe run on one node; {ROWS} × {LENGTH} tokens. Assumed: nodes of {CORES} such cores, links of",
        f"{LINK * 8 / 1e9:.0f} Gb/s, a shared store of {STORE / 1e9:.0f} GB/s. Not measured on such machines.", "",
        "| model | nodes | hours | speed-up | spent on |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in ("235B-A22B", "Coder-480B-A35B"):
        config = parse_config({**MODELS[name].config, "num_hidden_layers": MODELS[name].layers}, name)
        first = 0.0
        for nodes in NODES:
            spent = layer_seconds(config, rate, nodes)
            hours = MODELS[name].layers * sum(spent.values()) / 3600
            first = first or hours
            most = sorted(spent.items(), key=lambda item: -item[1])[:3]
            parts = ", ".join(f"{label} {value / sum(spent.values()):.0%}" for label, value in most)
            lines.append(f"| {name} | {nodes} | {hours:.1f} | {first / hours:.1f} | {parts} |")
    return lines
