"""How a quantized linear is stored in a Hugging Face folder.

Each layout is one module, found by its name. It defines, for a linear called `module` with weight `[out, in]`:

    supports(scheme) -> None | reason
    specs(module, shape, scheme, stored) -> {tensor name: (dtype, shape)}   in the order of the file
    pack(tensor) -> {tensor name: array}                                as `specs` announces them
    unpack(stored, module, shape, scheme) -> QuantizedTensor            its inverse
    config(schemes, linears) -> quantization_config                     raises RecipeError if it cannot say
    read_schemes(where, stored, linears) -> {linear: QuantScheme}        from another tool's quantization_config

`linears` are those of the blocks; `schemes` may also have the embedding and the head. Without `stored`, `specs` says
what we write. With it, `specs` says what another tool wrote, as far as the layout allows it: scales of another type,
no g_idx, a bias of zeros.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.recipe import DEFAULT_LAYOUT as DEFAULT
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES
from qwen3_export.errors import InputError

__all__ = ["DEFAULT", "Stored", "group_index", "layout"]
Schemes = dict[str, QuantScheme]
Shapes = Mapping[str, tuple[int, int]]
NEEDS_ORIGINAL = "give the 16-bit original"
# Tensors that other tools store even where the scheme does not need them; they must be zero then.
IDLE = ("weight_zero_point", "input_zero_point", "bias")
_FLOATS = tuple(SCALE_TYPES[name] for name in ("fp16", "bf16", "fp32"))


class TypedShape(Protocol):
    """A tensor's type and shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


@dataclass(frozen=True)
class Stored:
    """A folder's tensors, read when asked for.

    `config` is the `quantization_config` of the tool that wrote it, empty for a folder of ours.
    """

    entries: Mapping[str, TypedShape]
    read: Callable[[str], NDArray]
    config: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def dtype(self, name: str, *allowed: np.dtype) -> np.dtype:
        """The stored type if allowed (default: floats), else the first allowed one."""
        allowed = allowed or _FLOATS
        found = self.entries[name].dtype if name in self else None
        return found if found in allowed else allowed[0]

    def shape(self, name: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape if it differs only in axes of length one.

        Otherwise it is the wanted shape, and the audit will complain.
        """
        found = self.entries[name].shape if name in self else wanted
        return found if [n for n in found if n != 1] == [n for n in wanted if n != 1] else wanted


@lru_cache(maxsize=64)
def layout(name: str) -> ModuleType:
    """The module of a layout; InputError when it is unknown."""
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name.replace("-", "_") not in known:
        raise InputError(f"layout {name!r}: one of {', '.join(n.replace('_', '-') for n in known)} was expected")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def group_index(stored: Stored, name: str, shape: tuple[int, int], scheme: QuantScheme) -> NDArray[np.int32] | None:
    """The group of each input `[in]`, None when groups are consecutive inputs.

    Raises ValueError when there is a group that does not have `group_size` inputs.
    """
    if name not in stored:
        return None
    index, plain = stored.read(name), np.arange(shape[1], dtype=np.int32) // scheme.group_length(shape[1])
    # compressed-tensors wrote -1 for linears whose groups are consecutive.
    if np.array_equal(index, plain) or (index == -1).all():
        return None
    if not np.array_equal(np.sort(index), plain):
        raise ValueError(
            f"{name}: it puts inputs into the groups {index.min()} to {index.max()}; "
            f"{scheme.num_groups(shape[1])} groups of {scheme.group_length(shape[1])} inputs each were expected"
        )
    return index


def is_unquantized(stored: Stored, module: str, parts: tuple[str, ...]) -> bool:
    """Whether a linear has a 16-bit weight and no quantized parts."""
    return f"{module}.weight" in stored and not any(f"{module}.{part}" in stored for part in parts)


def scale_dtype_of(stored: Stored, name: str) -> str:
    """The scale type of a scheme, from the stored tensor.

    A scale that is missing or of an odd type is found later, by the audit of the folder.
    """
    found = stored.dtype(name)
    return next(key for key, dtype in SCALE_TYPES.items() if dtype == found)


def grouped_scheme(bits: Any, size: Any, stored: Stored, module: str) -> QuantScheme:
    grain = {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
    values = {"num_bits": bits, "symmetric": False, "scale_dtype": scale_dtype_of(stored, f"{module}.scales"), **grain}
    return QuantScheme.from_dict(values)
