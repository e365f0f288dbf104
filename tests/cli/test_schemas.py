"""JSON Schemas: one per command that prints an object, and none that says yes to everything.

That outputs fit them is checked by every test that calls a command with `--json`: see `helpers.call`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from jsonschema import Draft202012Validator

from qwen3_export.cli.commands import app
from qwen3_export.core.schemas import schema, schema_names
from qwen3_export.errors import InputError
from tests.cli.helpers import call, validator
from tests.cli.test_json import BENCH, EXPORT, QUANTIZE, VALIDATE

GATE = ["artifact", "metric", "baseline", "value", "delta", "ci95", "verdict"]
PLAN = ["possible", "reasons", "peak_rss_bytes", "disk_bytes", "seconds", "formats", "runtimes"]


def commands(group: Any, prefix: str = "") -> Iterator[str]:
    """Names of all commands that take `--json`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        elif any("--json" in parameter.opts for parameter in command.params):
            yield f"{prefix}{name}"


COMMANDS = sorted(commands(typer.main.get_command(app)))


def test_every_command_has_a_schema_and_every_schema_a_command() -> None:
    assert schema_names() == sorted(f"{command.replace(' ', '-')}.v1" for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_schema_is_one_and_names_its_version(command: str) -> None:
    found = schema(command)
    Draft202012Validator.check_schema(found)
    assert found["$id"] == f"urn:qwen3-export:{command.replace(' ', '-')}:1"
    assert found["type"] == "object"
    assert not validator(command).is_valid({})
    assert not validator(command).is_valid([])


@pytest.mark.parametrize(
    ("command", "place", "fields"),
    [
        ("quantize", (), QUANTIZE),
        *((name, (), EXPORT) for name in ("onnx", "gguf", "tensorrt")),
        ("validate", ("properties", "results", "items"), VALIDATE),
        ("bench", ("properties", "results", "items"), BENCH),
        ("gate", ("properties", "pairs", "items"), GATE),
        ("gate", (), ["verdict", "passed", "pairs"]),
        ("plan", (), PLAN),
        ("demo", ("properties", "results", "items"), [*VALIDATE, *BENCH]),
    ],
)
def test_the_fields_of_the_contract_are_required(command: str, place: tuple[str, ...], fields: list[str]) -> None:
    found: dict[str, Any] = schema(command)
    for key in place:
        found = found[key]
    assert not set(fields) - set(found["required"])
    assert not set(fields) - set(found["properties"])


def test_a_field_that_is_lost_or_of_another_type_is_found() -> None:
    values = json.loads(call("recipes", "list", "--json").out)
    check = validator("recipes list")
    assert check.is_valid(values)
    assert check.is_valid({**values, "added_later": 1})
    for name in values["recipes"][0]:
        lost, other = copy.deepcopy(values), copy.deepcopy(values)
        del lost["recipes"][0][name]
        other["recipes"][0][name] = 3.5
        assert not check.is_valid(lost)
        assert not check.is_valid(other)


def test_a_schema_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="validate: no schema of version 99"):
        schema("validate", 99)
