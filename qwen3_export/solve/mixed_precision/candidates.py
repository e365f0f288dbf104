"""The schemes that a search may choose from.

symmetric, signed, asymmetric    integers in groups of 128, 64 and 32, or in some of these
gguf                             ggml's block types; embedding and head as llama.cpp's mixes have them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen3_export.core.gguf_types import module_types
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.scheme import GGML_TYPES, QuantScheme, scheme_of_type
from qwen3_export.errors import InputError, RecipeError
from qwen3_export.solve.mixed_precision.units import Unit

GRIDS = ("symmetric", "signed", "asymmetric", "gguf")
BITS = (2, 3, 4, 5, 6, 8, 16)
# The shipped recipe whose options are used with each method.
OPTIONS_OF = {"gptq": "gptq-w4a16-g32", "rtn": "rtn-w4a16-g32", "awq": "awq-w4a16-g128"}
_GGUF_RECIPE = "gguf-q4_k_m"
_GGUF_TYPES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
# In blocks of 32, for rows that blocks of 256 do not divide.
_GGUF_SHORT_TYPES = ("iq4_nl", "q4_1", "q5_0", "q5_1")
_USUAL_BITS, _USUAL_GGUF_BITS = (4, 8), (3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)


def one_of(option: str, value: object, known: Sequence[Any]) -> Any:
    """The value if it is a known one; InputError otherwise."""
    if value not in known:
        raise InputError(f"{option} {value}: one of {', '.join(map(str, known))} was expected")
    return value


def is_gguf(grids: Sequence[str]) -> bool:
    """Whether ggml's types are searched; InputError when they are mixed with other grids."""
    if "gguf" in grids and len(set(grids)) > 1:
        raise InputError(
            f"--grids {','.join(grids)}: gguf goes with no other grid", "search twice: a folder has one layout"
        )
    return "gguf" in grids


def options_recipe(method: str, grids: Sequence[str]) -> str:
    """The shipped recipe whose method, options and layout a search uses."""
    if is_gguf(grids):
        one_of("--method with --grids gguf", method, ("gptq",))
        return _GGUF_RECIPE
    return OPTIONS_OF[one_of("--method", method, tuple(OPTIONS_OF))]


def schemes(
    grids: Sequence[str], bits: Sequence[int] | None, groups: Sequence[int] = GROUPS
) -> list[QuantScheme | None]:
    """All candidates, coarse to fine, None for 16 bits.

    `groups` are the sizes of groups below 8 bits.
    """
    for grid in grids:
        one_of("--grids", grid, GRIDS)
    sizes = sorted({one_of("--groups", size, GROUPS) for size in groups}, reverse=True)
    chosen = sorted({one_of("--bits", number, BITS) for number in bits or _usual(grids)})
    if is_gguf(grids):
        found: list[QuantScheme | None] = [scheme_of_type(name) for name in (*_GGUF_SHORT_TYPES, *_GGUF_TYPES)]
        found = [scheme for scheme in found if scheme is not None and scheme.num_bits in chosen]
        return found + [None] * (16 in chosen)
    found = []
    for number in chosen:
        if number in (5, 6):
            raise InputError(f"--bits {number}: only --grids gguf has types of {number} bits")
        for grid in () if number == 16 else ("symmetric",) if number == 8 else grids:
            signed, symmetric = grid == "signed", grid != "asymmetric"
            fitting_sizes = GROUPS if number == 8 else sizes
            found += [QuantScheme(number, "int", symmetric, "group", g, signed_scales=signed) for g in fitting_sizes]
        found += [None] if number == 16 else []
    return found


def _usual(grids: Sequence[str]) -> tuple[int, ...]:
    return _USUAL_GGUF_BITS if is_gguf(grids) else _USUAL_BITS


def fitting(unit: Unit, tried: Sequence[QuantScheme | None]) -> list[QuantScheme | None]:
    """Candidates whose groups or blocks divide the unit's inputs.

    Of those with 8 bits only the coarsest is kept, since their error is negligible anyway. ggml's blocks of 32 below 8
    bits are for rows that its blocks of 256 do not divide.
    """
    wide = [shape[1] for shape in unit.shapes.values()]
    found = [s for s in tried if s is None or not any(n % _length(s, n) for n in wide)]
    eight = [s for s in found if s is not None and s.num_bits == 8]
    found = [s for s in found if s not in eight[1:]]
    if any(_is_wide(s) for s in found):
        found = [s for s in found if s is None or s.block_type is None or _is_wide(s)]
    if not any(found):
        raise RecipeError(
            f"{unit.match}: no candidate fits its {wide[0]} inputs",
            f"groups of {GROUPS} and --bits 2 to 8 are tried, with --grids gguf blocks of 256, "
            "and of 32 with 4, 5 and 8 bits",
        )
    return found


def _is_wide(scheme: QuantScheme | None) -> bool:
    """Whether a scheme is one of ggml's blocks of 256."""
    return scheme is not None and scheme.block_type is not None and scheme.block_type.is_super


def _length(scheme: QuantScheme, inputs: int) -> int:
    """Number of inputs of a row that are stored together."""
    block = scheme.block_type
    return scheme.group_length(inputs) if block is None else block.block


def probe_first(unit: Unit, found: Sequence[QuantScheme | None], target: float) -> list[QuantScheme]:
    """The schemes to measure, first the one whose size is nearest to the target."""
    real = [scheme for scheme in found if scheme is not None]
    return sorted(real, key=lambda scheme: abs(unit.bits(scheme) / unit.weights - target))


def gguf_outer(config: Qwen3Config) -> dict[str, QuantScheme]:
    """Embedding and head in the types that llama.cpp's q4_k_m has for them."""
    types = module_types(config, "q4_k_m", weighed=True)
    outer = {module: types[module] for module in config.outer_matrices()}
    return {module: scheme_of_type(name) for module, name in outer.items() if name in GGML_TYPES}
