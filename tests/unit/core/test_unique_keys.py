"""A key that stands twice is refused by name and line; what YAML allows to be repeated is read as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwen3_export.core.files import read_json, read_yaml
from qwen3_export.errors import InputError
from qwen3_export.prove.limits import read_limits
from qwen3_export.prove.tasks import read_tasks
from qwen3_export.prove.tolerance import read_tolerance

TWICE = {
    "at the top": ("max_kl: 1\nmin_top1: 0.9\nmax_kl: 2\n", "the key 'max_kl' is given twice, in lines 1 and 3"),
    "nested": ("domains:\n  math: {max_kl: 1}\n  code: {max_kl: 1, max_kl: 2}\n", "'max_kl' .* lines 3 and 3"),
    "in a list": ("- a: 1\n- {b: 1,\n  b: 2}\n", "'b' .* lines 2 and 3"),
    "in JSON": ('{"max_kl": 1,\n "max_kl": 2}', "'max_kl' .* lines 1 and 2"),
    "in two spellings": ("1: a\n0x1: b\n", "'0x1' .* lines 1 and 2"),
}


@pytest.mark.parametrize("case", TWICE)
def test_yaml_that_has_a_key_twice_is_refused(case: str, tmp_path: Path) -> None:
    text, words = TWICE[case]
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert yaml.safe_load(text)  # whose last value wins
    with pytest.raises(InputError, match=f"{file}: .*{words}"):
        read_yaml(file)


@pytest.mark.parametrize(
    "text",
    [
        "base: &a {x: 1, y: 2}\nmine:\n  <<: *a\n  x: 3\n",
        "a: &a {x: 1}\nb: &b {y: 1}\nc:\n  <<: *a\n  <<: *b\n",
        "deep: [[[[&a {<<: &z {x: 1}, x: 2}]]]]\nb: {<<: *a}\n",
        "- {a: 1}\n- {a: 2}\n",
        "a: &a [1]\nb: *a\n",
        "? [1, 2]\n: a\n",
        "",
    ],
)
def test_other_yaml_is_read_as_before(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError as error:
        with pytest.raises(InputError, match=str(error).splitlines()[0]):
            read_yaml(file)
    else:
        assert read_yaml(file) == expected


def test_gates_and_tolerances_are_such_files(tmp_path: Path) -> None:
    file = tmp_path / "gate.json"
    file.write_text('{"domains": {"math": {"max_kl": 1}}, "domains.math.max_kl": 2}')
    with pytest.raises(InputError, match=r"domains\.math\.max_kl is given twice"):
        read_limits(file)
    file.write_text('{"kl_mean": 1, "kl_mean": 2}')
    with pytest.raises(InputError, match="'kl_mean' is given twice"):
        read_tolerance(file)


def test_tasks_are_such_lines(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "b", "answer": "c"}\n')
    with pytest.raises(InputError, match=r"line 2: .*'answer' is given twice"):
        read_tasks(file)


def test_json_of_programs_is_read_as_before(tmp_path: Path) -> None:
    """Only what people write is looked at, since it takes time."""
    file = tmp_path / "file.json"
    file.write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    assert read_json(file) == {"a": 1, "b": {"c": 2}}
    with pytest.raises(InputError, match="'c' is given twice"):
        read_json(file, unique=True)
