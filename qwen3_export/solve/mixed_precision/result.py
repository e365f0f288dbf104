"""A search's result: the recipe as YAML, how it came about as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen3_export.core.progress import peak_rss_bytes
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import GGML_TYPES, QuantScheme, scheme_of_type
from qwen3_export.solve.mixed_precision.sensitivity import Sensitivity


@dataclass(frozen=True)
class SearchResult:
    """The recipe and how it came about.

    It has each unit's sensitivity and the chosen scheme, None for 16 bits.
    """

    recipe: Recipe
    units: tuple[tuple[Sensitivity, QuantScheme | None], ...]
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Over all units."""
        total = sum(s.unit.bits(scheme) for s, scheme in self.units)
        return total / sum(s.unit.weights for s, _ in self.units)

    @property
    def expected_kl(self) -> float:
        """Sum of the units' own KLs, nats per token."""
        return sum(s.loss(scheme) for s, scheme in self.units)

    def expected_uniform_kl(self) -> float | None:
        """The same for the best single scheme that fits into as many bits.

        None when none does.
        """
        bits, sums = sum(s.unit.bits(scheme) for s, scheme in self.units), []
        for scheme in dict.fromkeys(scheme for s, _ in self.units for scheme in s.errors):
            fits = all(scheme in s.errors for s, _ in self.units)
            if fits and sum(s.unit.bits(scheme) for s, _ in self.units) <= bits:
                sums.append(sum(s.loss(scheme) for s, _ in self.units))
        return min(sums, default=None)


def outcome(found: SearchResult, target_bpw: float, output: Path) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "output": str(output),
        "recipe": found.recipe.to_dict(),
        "target_bpw": target_bpw,
        "bits_per_weight": found.bits_per_weight,
        "expected_kl": found.expected_kl,
        "expected_uniform_kl": found.expected_uniform_kl(),
        "units": [
            {
                "match": s.unit.match,
                "weights": s.unit.weights,
                "probe": s.probe.label,
                "probe_kl": s.kl,
                "scheme": scheme.label if scheme else None,
                "expected_kl": s.loss(scheme),
                "bits_per_weight": s.unit.bits(scheme) / s.unit.weights,
            }
            for s, scheme in found.units
        ],
        "seconds": found.seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file, schemes without what they leave at its default.

    In a recipe for GGUF they have ggml's names. The same recipe gives the same bytes.
    """
    values, usual = recipe.to_dict(), QuantScheme().to_dict()
    named = {scheme_of_type(name): name for name in GGML_TYPES} if recipe.layout == "ggml" else {}
    shown = ("num_bits", "symmetric", "strategy", "group_size")
    for rule, item in zip(recipe.rules, values["rules"], strict=True):
        if rule.scheme in named:
            item["scheme"] = named[rule.scheme]
        elif item["scheme"]:
            item["scheme"] = {k: v for k, v in item["scheme"].items() if k in shown or v != usual[k]}
    return yaml.safe_dump(values, sort_keys=False, width=120, default_flow_style=None)
