"""Seeded tasks of arithmetic, copying and JSON, abilities that coarse codes lose first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from qwen3_export.errors import InputError
from qwen3_export.prove.tasks import Task

Draw = Callable[[np.random.Generator, str], Task]
_LETTERS = "bcdfghjklmnpqrstvwxz"
_NAMES = ("Ada", "Bruno", "Chen", "Dora", "Emil", "Farid", "Greta", "Hugo", "Ines", "Jun")
_CITIES = ("Lima", "Oslo", "Pune", "Quito", "Riga", "Sofia", "Tunis", "Vaduz", "Warsaw", "Yaren")


def _arithmetic(random: np.random.Generator, name: str) -> Task:
    a, b = (int(value) for value in random.integers(2, 100, 2))
    sign, value = [("+", a + b), ("-", a - b), ("*", a * b)][int(random.integers(3))]
    prompt = f"What is {a} {sign} {b}? Answer with the number alone."
    return Task(prompt, str(value), "number", name, "arithmetic", max_new_tokens=24)


def _copying(random: np.random.Generator, name: str) -> Task:
    words = [
        "".join(random.choice(list(_LETTERS), int(random.integers(2, 6)))) for _ in range(int(random.integers(2, 7)))
    ]
    text = " ".join(words)
    prompt = f"Repeat this line exactly, and write nothing else:\n{text}"
    return Task(prompt, text, "exact", name, "copying", max_new_tokens=48)


def _json(random: np.random.Generator, name: str) -> Task:
    person, city = str(random.choice(_NAMES)), str(random.choice(_CITIES))
    age = int(random.integers(18, 90))
    prompt = (
        f"{person} is {age} years old and lives in {city}. Write this as one JSON object with the keys name, age, city."
    )
    wanted = json.dumps({"name": person, "age": age, "city": city})
    return Task(prompt, wanted, "json", name, "json", max_new_tokens=64)


KINDS: dict[str, Draw] = {"arithmetic": _arithmetic, "copying": _copying, "json": _json}


def generate_tasks(count: int, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> list[Task]:
    """Generate `count` tasks, the kinds in turn; InputError for an unknown kind.

    The same seed gives the same tasks.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--kinds {kind}: one of {', '.join(KINDS)} was expected")
    if not kinds:
        raise InputError(f"--kinds is empty: some of {', '.join(KINDS)} were expected")
    random, found = np.random.default_rng(seed), []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        found.append(KINDS[kind](random, f"{kind}-{number}"))
    return found


def to_jsonl(tasks: Sequence[Task]) -> str:
    """The text of a JSONL file of tasks, which `tasks.read_tasks` reads."""
    lines = []
    for task in tasks:
        values = {key: value for key, value in vars(task).items() if value not in (None, "", False)}
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    return "".join(lines)
