"""Fixtures that several tests of the core share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.recipe import Recipe, load_recipe
from tests.conftest import random_tensors, tiny_config
from tests.unit.core.checkpoints import Tensors
from tests.unit.core.recipes import recipe_values


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(parse_config(tiny_config(), "test"))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """`load(key=value, …)` writes a valid recipe with these changes and loads it back by its path."""

    def from_file(**changes: Any) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(recipe_values(**changes)))
        return load_recipe(str(path))

    return from_file
