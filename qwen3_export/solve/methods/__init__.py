"""One file or folder per quantization method; its name is the recipe's `method`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import check_keys
from qwen3_export.errors import RecipeError

# Far above any sensible value: passes of an option such as `descent` must end.
_MOST = 100_000


def load_method(recipe: Recipe) -> tuple[ModuleType, Any]:
    """The method's module and its checked options; RecipeError when either is unknown."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if recipe.method not in known:
        raise RecipeError(f"recipe {recipe.name}: unknown method {recipe.method!r}", f"methods: {', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{recipe.method}")
    where = f"recipe {recipe.name}, options"
    fields = {field.name: field for field in dataclasses.fields(module.Options)}
    check_keys(recipe.options, list(fields), where)
    for key, value in recipe.options.items():
        wanted = type(fields[key].default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise RecipeError(f"{where}: {key} is {value!r}, a {wanted.__name__} was expected")
        if wanted is not bool and isinstance(value, int | float) and not 0 <= value <= _MOST:
            raise RecipeError(f"{where}: {key} is {value!r}, a number from 0 to {_MOST:,} was expected")
    return module, module.Options(**recipe.options)
