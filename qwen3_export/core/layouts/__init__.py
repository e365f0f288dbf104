"""How a quantized linear is stored in a Hugging Face folder. One file per layout, found by its name.

A layout module defines, for a linear called `module` with weight `[out, in]`:

    supports(scheme) -> None | reason
    specs(module, shape, scheme) -> {tensor name: (dtype, shape)}       in the order of the file
    pack(tensor) -> {tensor name: array}                                as `specs` announces them
    unpack(read, module, shape, scheme) -> QuantizedTensor              its inverse
    config(schemes, linears) -> quantization_config                     raises RecipeError if it cannot say
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from qwen3_export.errors import InputError

DEFAULT = "compressed-tensors"


def layout(name: str) -> ModuleType:
    """The module of a layout; InputError when it is unknown."""
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name.replace("-", "_") not in known:
        raise InputError(f"layout {name!r}: one of {', '.join(n.replace('_', '-') for n in known)} was expected")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
