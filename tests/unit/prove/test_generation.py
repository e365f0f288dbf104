"""Chats in both modes, thoughts that are cut, flips, and tasks with their statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.errors import InputError
from qwen3_export.prove.drift import flips, sample_drift
from qwen3_export.prove.generation import Chats, chat_generation, ended
from qwen3_export.prove.reference import full_truth
from qwen3_export.prove.task_generator import KINDS, generate_tasks, to_jsonl
from qwen3_export.prove.tasks import Task, compare, is_right, mcnemar_interval, mcnemar_p, read_tasks, tasks_sha256
from qwen3_export.run.thinking import CUT, ThinkingBudget, Thought, thinking_budget
from qwen3_export.text.tokenizer import ModelTokenizer

STOP, END, CUTS = 9, 5, (6, 5, 7)


class Script:
    """A model that says the same tokens whatever it is told."""

    runtime = version = device = "script"
    threads, vocab_size, context = 1, 10, 100

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def _logits(self) -> NDArray[np.float32]:
        self._place += 1
        return np.eye(10, dtype=np.float32)[self._tokens[self._place - 1]]

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        self._place = 0
        return self._logits()[None]

    def decode(self, token: int) -> NDArray[np.float32]:
        return self._logits()

    def close(self) -> None:
        pass


def _chats(thinking: tuple[int, ...], plain: tuple[int, ...], budget: ThinkingBudget | None = None) -> Chats:
    prompts = {"thinking": ((1, 2),), "no_thinking": ((1,),)}
    return Chats(prompts, {"thinking": (thinking,), "no_thinking": (plain,)}, (STOP,), 8, budget)


def test_agreement_length_and_stops_per_mode() -> None:
    found = chat_generation(Script([1, 2, 3, STOP, 1, 1, 1, 1]), _chats((1, 2, 4, STOP), (1, 2, 3, 4, 4, 4, 4, 4)))
    thinking, plain = found["thinking"], found["no_thinking"]
    assert (thinking["agreement_length"], thinking["agreement"], thinking["stops_as_original"]) == (2, 0.75, 1)
    assert (plain["agreement_length"], plain["agreement"]) == (3, 3 / 8)
    assert (plain["stops"], plain["stops_reference"], plain["stops_as_original"]) == (1, 0, 0)
    assert plain["loops_reference"] == 1
    assert ended((1, STOP, 3), (STOP,)) == (1, STOP)


def test_thought_is_cut_after_its_budget_and_in_thinking_mode_alone() -> None:
    budget = ThinkingBudget(2, END, CUTS)
    chats = _chats((1, 1, *CUTS, 1, 1, 1), (1,) * 8, budget)
    found = chat_generation(Script([1] * 8), chats)
    assert found["thinking"]["agreement"] == found["no_thinking"]["agreement"] == 1
    assert found["thinking"]["thinking_budget"] == 2
    assert found["no_thinking"]["thinking_budget"] is None


def test_thought_that_ends_by_itself_is_left_alone() -> None:
    thought = Thought(ThinkingBudget(3, END, CUTS))
    assert [thought.follow(token) for token in (1, END, 2, 2, 2, 2)] == [1, END, 2, 2, 2, 2]
    assert not thought.was_cut
    thought = Thought(ThinkingBudget(1, END, CUTS))
    assert [thought.follow(token) for token in (1, 1, 1, 1, 3)] == [1, *CUTS, 3]
    assert thought.was_cut


def test_budget_in_the_models_own_tokens(reference_folder: Path) -> None:
    tokenizer = ModelTokenizer(reference_folder)
    budget = thinking_budget(tokenizer, 16)
    assert budget is not None
    assert tokenizer.decode(budget.cut, skip_special=False) == CUT
    assert budget.end in budget.cut
    assert thinking_budget(tokenizer, None) is None


def test_chats_survive_a_file_and_refuse_damage() -> None:
    chats = _chats((1, 2), (3,), ThinkingBudget(2, END, CUTS))
    values = json.loads(json.dumps(chats.to_dict()))
    assert Chats.from_dict(values, 10) == chats
    for damage in (
        {"stops": [10]},
        {"prompts": {"thinking": [[1]]}},
        {"answers": values["prompts"] | {"thinking": []}},
    ):
        with pytest.raises((ValueError, KeyError, TypeError)):
            Chats.from_dict({**values, **damage}, 10)


def test_flips_count_where_the_original_is_sure() -> None:
    sure, unsure = np.array([9.0, 0, 0]), np.array([0.1, 0, 0])
    ids = np.zeros(4, np.int32)
    truth = full_truth(np.array([sure, sure, unsure, sure], np.float32), ids)
    ours = np.array([[0, 9.0, 0], sure, [0, 9.0, 0], sure], np.float32)
    found = flips([sample_drift(truth, ours, ids)])
    assert (found["sure_positions"], found["flips"], found["share"]) == (2, 1, 0.5)


@pytest.mark.parametrize(
    ("match", "wanted", "right", "wrong"),
    [
        ("exact", "a b", " a b\n", "a  b"),
        ("contains", "42", "it is 42.", "it is 24."),
        ("number", "-1200", "so -1,200", "1200"),
        ("json", '{"a": [1]}', 'Here: {"a":[1]} done', '{"a": [2]}'),
        ("regex", "^y(es)?$", "yes", "yesterday"),
    ],
)
def test_match_rules(match: str, wanted: str, right: str, wrong: str) -> None:
    task = Task("?", wanted, match)
    assert is_right(task, right)
    assert is_right(task, f"<think>{wrong}</think>{right}")
    assert not is_right(task, wrong)
    assert not is_right(task, "")


def test_generated_tasks_are_seeded_and_their_answers_right(tmp_path: Path) -> None:
    made = generate_tasks(30, seed=5)
    assert made == generate_tasks(30, seed=5) != generate_tasks(30, seed=6)
    assert {task.kind for task in made} == set(KINDS)
    assert all(is_right(task, task.answer) and not is_right(task, "no") for task in made)
    path = tmp_path / "tasks.jsonl"
    path.write_text(to_jsonl(made))
    assert read_tasks(path) == made
    with pytest.raises(InputError, match="poetry"):
        generate_tasks(1, kinds=("poetry",))


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "line 1"),
        ('{"prompt": "a"}', "answer"),
        ('{"prompt": "a", "answer": "x", "match": "number"}', "line 1"),
        ('{"prompt": "a", "answer": "(", "match": "regex"}', "line 1"),
        ('{"prompt": "a", "answer": "b", "math": "exact"}', "math"),
        ('{"prompt": " ", "answer": "b"}', "texts"),
        ("", "no task"),
    ],
)
def test_malformed_tasks_are_refused(line: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=word):
        read_tasks(path)


def test_changes_of_paired_answers() -> None:
    tasks = generate_tasks(6)
    found = compare(tasks, [True, True, True, False, False, True], [True, False, False, True, False, True])
    assert (found["right_to_wrong"], found["wrong_to_right"], found["original_right"]) == (2, 1, 4)
    assert found["kinds"]["arithmetic"] == {"tasks": 2, "original_right": 1, "artifact_right": 2}
    assert found["lost_share_ci95"][0] < found["lost_share"] < found["lost_share_ci95"][1]
    assert found["tasks_sha256"] == tasks_sha256(tasks) != tasks_sha256(tasks[:5])


def test_mcnemar_against_the_binomial_distribution_and_the_published_interval() -> None:
    assert mcnemar_p(10, 0) == pytest.approx(2 / 2**10)
    assert mcnemar_p(3, 3) == mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(1, 8) == mcnemar_p(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    low, high = mcnemar_interval(20, 10, 100)
    assert (low + high) / 2 == pytest.approx(10 / 102)
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(31 - 100 / 102) / 102)
