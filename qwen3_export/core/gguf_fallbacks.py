"""Tensors of a GGUF file that cannot have the wanted type.

Where a type's blocks do not divide a tensor's rows, llama.cpp takes a type with blocks of 32, or f16 where these do not
divide a row either. What its mix chooses for a tensor is the wanted type: only what the width of a row has changed is
told here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_export.core.gguf_types import PLAIN, block_length, gguf_name, module_types, wanted_types
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.recipe import Recipe

_NAMED, _MOST = 3, 0.5


@dataclass(frozen=True)
class Fallback:
    """A tensor, its wanted type and the one it has.

    `row_width` weights are a row; `asked_for` says whether an option asked for the wanted type.
    """

    name: str
    wanted: str
    type: str
    row_width: int
    asked_for: bool = False

    @property
    def block_size(self) -> int:
        """Weights that the wanted type stores together."""
        return block_length(self.wanted)


@dataclass(frozen=True)
class Fallbacks:
    """All such tensors of a file.

    `left` is the share of its weights to be quantized that stay in 16 bits for want of a type.
    """

    tensors: tuple[Fallback, ...]
    left: float

    @staticmethod
    def of(result: Mapping[str, Any]) -> Fallbacks:
        """Those that an export's result has; none for other formats."""
        keys = ("name", "wanted", "type", "row_width", "asked_for")
        tensors = tuple(Fallback(*map(item.get, keys)) for item in result.get("fallbacks", ()))
        return Fallbacks(tensors, result.get("left_in_16_bits", 0.0))

    def result(self) -> dict[str, Any]:
        """The fields of an export's result."""
        fields = ("name", "wanted", "type", "row_width", "block_size", "asked_for")
        return {
            "fallbacks": [{name: getattr(item, name) for name in fields} for item in self.tensors],
            "left_in_16_bits": self.left,
        }

    def summary(self) -> dict[str, str]:
        """Lines of an export's summary, by title; none without such tensors."""
        if not self.tensors:
            return {}
        counts = Counter((item.type, item.wanted, item.row_width, item.block_size) for item in self.tensors)
        told = "; ".join(
            f"{count} {found} instead of {wanted} (rows of {width}, blocks of {block})"
            for (found, wanted, width, block), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        )
        asked = [item.name for item in self.tensors if item.asked_for]
        if asked:
            others = f" and {len(asked) - _NAMED} others" if len(asked) > _NAMED else ""
            told += f"; asked for, and not possible: {', '.join(asked[:_NAMED])}{others}"
        return {"other types": told, **({"in 16 bits": self._mostly()} if self.left > _MOST else {})}

    def warning(self) -> str | None:
        """All of it in one line; None where every tensor has the wanted type."""
        if not self.tensors:
            return None
        count = len(self.tensors)
        begin = "1 tensor gets" if count == 1 else f"{count} tensors get"
        lines = ". ".join(self.summary().values())
        return f"{begin} another type than wanted, whose blocks do not divide a row: {lines}"

    def _mostly(self) -> str:
        """That most of a file is not quantized, and what to do."""
        widths = sorted({item.row_width for item in self.tensors if item.type in PLAIN})
        rows = " and ".join(map(str, widths))
        remedy = "" if any(width % 16 for width in widths) else "; `onnx` holds them with a recipe of group_size 16"
        return (
            f"{self.left:.0%} of the weights to be quantized stay in 16 bits: no type of llama.cpp divides rows of "
            f"{rows}, since its smallest blocks have 32 weights{remedy}"
        )


def fallbacks_of(
    shapes: Mapping[str, tuple[int, int]], types: Mapping[str, str], wanted: Mapping[str, str],
    asked: Callable[[str], bool] = lambda module: False,
) -> Fallbacks:  # fmt: skip
    """The tensors whose type is not the wanted one.

    `types` and `wanted` are by module name; experts of a stack are one tensor.
    """
    found, left, total = dict[str, Fallback](), 0, 0
    for module, kind in types.items():
        want = wanted.get(module, kind)
        if want not in PLAIN:
            total += math.prod(shapes[module])
        if want == kind:
            continue
        left += math.prod(shapes[module]) if kind in PLAIN else 0
        name = f"{gguf_name(module)}.weight"
        if name not in found:
            found[name] = Fallback(name, want, kind, shapes[module][1], asked(module))
    return Fallbacks(tuple(found.values()), left / total if total else 0.0)


def recipe_fallbacks(recipe: Recipe, config: Qwen3Config) -> Fallbacks:
    """As `fallbacks_of`, for the matrices whose types a recipe's `file_type` decides."""
    if not recipe.file_type:
        return Fallbacks((), 0.0)
    weighed = recipe.method != "rtn"
    wanted = wanted_types(config, recipe.file_type, weighed)
    types = {
        module: found
        for module, found in module_types(config, recipe.file_type, weighed).items()
        if not any(rule.matches(module) for rule in recipe.rules)
    }
    return fallbacks_of(config.all_matrices(), types, wanted)
