"""Tasks with right answers: what the original can do and an artifact cannot.

    {"prompt": "What is 12 + 30?", "answer": "42", "match": "number"}      one line of a JSONL file
    optional: "id", "kind", "system", "thinking" (false), "max_new_tokens" (64)

    match     right when
    exact     the text, stripped, is the answer
    contains  the text contains the answer
    number    the last number of the text is the answer
    json      the text holds a JSON value equal to the answer's
    regex     the answer, a regular expression, is found in the text

Both models answer greedily, each in its own runtime. Of n tasks, b are right for the original and wrong for the
artifact, c the other way. The p-value is that of McNemar's exact test on b + c, the interval of (b − c) / n that of
Agresti and Min (2005), which adds half a task to every cell.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_lines
from qwen3_export.core.manifest import sha256_text
from qwen3_export.core.progress import Progress
from qwen3_export.core.scheme import check_keys
from qwen3_export.core.unique_keys import loads_json
from qwen3_export.errors import InputError, RecipeError
from qwen3_export.run.generate import Sampling, answer
from qwen3_export.run.session import Session
from qwen3_export.text.tokenizer import TextModel

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_KEYS = ["id", "kind", "prompt", "answer", "match", "system", "thinking", "max_new_tokens"]


@dataclass(frozen=True)
class Task:
    """One question, its right answer, and the rule `match` for comparing."""

    prompt: str
    answer: str
    match: str = "exact"
    id: str = ""
    kind: str = ""
    system: str | None = None
    thinking: bool = False
    max_new_tokens: int = 64

    def messages(self) -> list[dict[str, Any]]:
        """The question as a chat."""
        asked = [{"role": "user", "content": self.prompt}]
        return [{"role": "system", "content": self.system}, *asked] if self.system else asked


def is_right(task: Task, text: str) -> bool:
    """Whether an answer is right; a thought before it does not count."""
    return _RULES[task.match](_THOUGHT.sub("", text).strip(), task.answer)


def _number(text: str, wanted: str) -> bool:
    found = _NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(wanted.replace(",", ""))


def _json(text: str, wanted: str) -> bool:
    decoder, target = json.JSONDecoder(), json.loads(wanted)
    for place, character in enumerate(text):
        if character in '{["-0123456789tfn':
            try:
                value, _ = decoder.raw_decode(text, place)
            except (ValueError, RecursionError):
                continue
            return bool(value == target)
    return False


_RULES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda text, wanted: text == wanted.strip(),
    "contains": lambda text, wanted: wanted in text,
    "number": _number,
    "json": _json,
    "regex": lambda text, wanted: re.search(wanted, text) is not None,
}


def read_tasks(path: Path) -> list[Task]:
    """Read the tasks of a JSONL file; InputError names a malformed line."""
    lines = enumerate(read_lines(path), 1)
    tasks = [_task(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not tasks:
        raise InputError(f"{path}: no task in it", 'a line is {"prompt": "…", "answer": "…", "match": "exact"}')
    return tasks


def _task(line: str, where: str) -> Task:
    try:
        values = loads_json(line)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        check_keys(values, _KEYS, where)
        task = Task(**{"id": where.rpartition(" ")[2], **values})
        texts = (task.prompt, task.answer, task.match, task.id, task.kind, task.system or "")
        if not all(isinstance(text, str) for text in texts) or not task.prompt.strip():
            raise ValueError("prompt and answer are texts")
        if not isinstance(task.thinking, bool) or type(task.max_new_tokens) is not int or task.max_new_tokens < 1:
            raise ValueError("thinking is true or false, max_new_tokens a positive number")
        if task.match not in _RULES:
            raise ValueError(f"match is {task.match!r}, one of {', '.join(_RULES)} was expected")
        _parse(task)
    except RecipeError as error:
        raise InputError(str(error), error.hint) from error
    except (ValueError, TypeError, RecursionError, re.error) as error:
        raise InputError(f"{where}: not a task ({error})", f"keys of a task: {', '.join(_KEYS)}") from error
    return task


def _parse(task: Task) -> None:
    """Check that an answer parses as its rule demands.

    Raises ValueError or re.error when it is not the number, JSON or regular expression that it must be.
    """
    if task.match == "number":
        float(task.answer.replace(",", ""))
    elif task.match == "json":
        json.loads(task.answer)
    elif task.match == "regex":
        re.compile(task.answer)


def tasks_sha256(tasks: Sequence[Task]) -> str:
    """Hash of everything in the tasks that decides the answers and their verdicts."""
    return sha256_text(json.dumps([vars(task) for task in tasks], sort_keys=True))


def solve(
    session: Session, tokenizer: TextModel, tasks: Sequence[Task], label: str, progress: Progress | None = None
) -> list[bool]:
    """Have a model answer greedily; whether it gets each task right."""
    right = []
    with (progress or Progress()).bar(f"tasks of {label}", len(tasks)) as tick:
        for task in tasks:
            found = answer(session, tokenizer, label, task.messages(), task.thinking, Sampling(task.max_new_tokens))
            right.append(is_right(task, found["text"]))
            tick()
    return right


def compare(tasks: Sequence[Task], original: Sequence[bool], artifact: Sequence[bool]) -> dict[str, Any]:
    """Right answers of original and artifact, in all and per kind.

    With the interval of the lost share, and McNemar's p-value.
    """
    pairs = list(zip(original, artifact, strict=True))
    lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    kinds: dict[str, dict[str, int]] = {}
    for task, (a, b) in zip(tasks, pairs, strict=True):
        counts = kinds.setdefault(task.kind or "tasks", {"tasks": 0, "original_right": 0, "artifact_right": 0})
        counts["tasks"] += 1
        counts["original_right"] += a
        counts["artifact_right"] += b
    return {
        "tasks": len(pairs),
        "tasks_sha256": tasks_sha256(tasks),
        "original_right": sum(original),
        "artifact_right": sum(artifact),
        "right_to_wrong": lost,
        "wrong_to_right": won,
        "lost_share": (lost - won) / len(pairs),
        "lost_share_ci95": list(mcnemar_interval(lost, won, len(pairs))),
        "p_value": mcnemar_p(lost, won),
        "kinds": kinds,
        "items": [{"id": t.id, "original": a, "artifact": b} for t, (a, b) in zip(tasks, pairs, strict=True)],
    }


def mcnemar_interval(lost: int, won: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of (lost − won) / count, after Agresti and Min (2005)."""
    total, b, c = count + 2, lost + 0.5, won + 0.5
    middle = (b - c) / total
    half = z * math.sqrt(max(0.0, b + c - (b - c) ** 2 / total)) / total
    return max(-1.0, middle - half), min(1.0, middle + half)


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test."""
    count = lost + won
    if count == 0:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(lost, won) + 1)) / 2**count
    return min(1.0, 2 * tail)
