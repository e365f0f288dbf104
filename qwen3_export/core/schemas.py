"""The JSON Schemas of what commands print with `--json`.

Each is a versioned file in the package. Within a version fields are only added. When a field is removed or changes its
meaning, the version is raised and the old file stays.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from qwen3_export.errors import InputError

VERSION = 1


def schema(command: str, version: int = VERSION) -> dict[str, Any]:
    """The schema of a command's object, `validate` or `recipes list`.

    Raises InputError when there is none.
    """
    name = f"{command.replace(' ', '-')}.v{version}.json"
    file = resources.files("qwen3_export") / "schemas" / name
    if not file.is_file():
        raise InputError(f"{command}: no schema of version {version}", f"there are {', '.join(schema_names())}")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def schema_names() -> list[str]:
    """File names of all schemas, without `.json`."""
    folder = resources.files("qwen3_export") / "schemas"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))
