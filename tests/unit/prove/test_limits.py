"""Limits of a gate: how they are written, and which are refused before anything is measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from qwen3_export.errors import InputError
from qwen3_export.prove.gate import check
from qwen3_export.prove.limits import LIMITS, parse_limit, read_limits, refuse_unmeasurable
from qwen3_export.prove.tolerance import Tolerance, read_tolerance
from tests.unit.prove.reports import RESULT


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("min_top1", 92, "lies between 0 and 1"),
        ("min_top1", -0.1, "lies between 0 and 1"),
        ("max_kl", -1, "never below 0"),
        ("max_kl", math.nan, "a finite number"),
        ("max_kl", math.inf, "a finite number"),
        ("max_ppl_ratio", 0, "always above 0"),
        ("max_bytes", 0, "always above 0"),
        ("domains.math.min_top1", 2, "lies between 0 and 1"),
        ("thinking.min_agreement", 1.5, "lies between 0 and 1"),
        ("min_decode_tokens_per_second", -3, "always above 0"),
        ("max_extra_loops", -1, "never below 0"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_with_the_reason(
    name: str, value: float, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{name}: .* cannot be a limit: .*{reason}"):
        parse_limit(name, value)
    *sections, last = name.split(".")
    for section in reversed([*sections, last]):
        value = {section: value}  # type: ignore[assignment]
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(InputError, match=r"gate\.yaml: .* cannot be a limit"):
        read_limits(tmp_path / "gate.yaml")


def test_a_percentage_in_place_of_a_share_is_guessed() -> None:
    with pytest.raises(InputError) as caught:
        parse_limit("min_top1", 92)
    assert caught.value.hint == "0.92 for 92 %"


@pytest.mark.parametrize(
    ("text", "count"), [("9MB", 9e6), ("9 MiB", 9 * 2**20), ("1.5GB", 1.5e9), ("800kB", 8e5), ("'12'", 12), ("12", 12)]
)
def test_sizes_are_written_as_people_do(text: str, count: float, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(f"max_bytes: {text}\nmax_peak_memory: {text}\n")
    assert read_limits(tmp_path / "gate.yaml") == {"max_bytes": count, "max_peak_memory": count}


def test_powers_of_ten_without_a_point_are_numbers(tmp_path: Path) -> None:
    """YAML takes `1e-3` for a text."""
    (tmp_path / "gate.yaml").write_text("max_kl: 1e-3\nmax_bytes: 1e9\n")
    assert read_limits(tmp_path / "gate.yaml") == {"max_kl": 0.001, "max_bytes": 1e9}
    (tmp_path / "tolerance.yaml").write_text("kl_mean: 1e-3\nbytes: 1e3\n")
    found = read_tolerance(tmp_path / "tolerance.yaml")
    assert (found["kl_mean"], found["bytes"]) == (Tolerance(absolute=0.001), Tolerance(absolute=1000))


def test_limits_of_a_domain_and_of_thinking(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(
        "max_kl: 1\ndomains:\n  code: {max_kl: 0.01, min_top1: 0.8}\n  v1.2: {max_ppl_ratio: 2}\n"
        "thinking: {max_extra_loops: 0}\nno_thinking: {min_agreement: 0.5}\n"
    )
    limits = read_limits(tmp_path / "gate.yaml")
    assert list(limits) == [
        *("max_kl", "domains.code.max_kl", "domains.code.min_top1", "domains.v1.2.max_ppl_ratio"),
        *("thinking.max_extra_loops", "no_thinking.min_agreement"),
    ]
    domains = {**RESULT["domains"], "v1.2": {"tokens": 4, "ppl_ratio": 1.5}}
    modes = {"thinking": {"extra_loops": 1, "agreement": 1}, "no_thinking": {"extra_loops": 0, "agreement": 0.5}}
    result = {**RESULT, "domains": domains, "generation": {**RESULT["generation"], **modes}}
    verdict = check(result, limits)
    assert [item["passed"] for item in verdict["checks"]] == [True, False, True, True, False, True]
    assert [item["value"] for item in verdict["checks"]] == [0.01, 0.02, 0.8, 1.5, 1, 0.5]
    refuse_unmeasurable(limits, ("code", "v1.2"), {})
    with pytest.raises(InputError, match=r"domains\.code\.max_kl: the reference's text has no domain 'code'"):
        refuse_unmeasurable(limits, ("prose", "v1.2"), {})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("max_right_to_wrong", "tasks"),
        ("max_changed_sidecars", "sidecars"),
        ("thinking.max_extra_loops", "thinking"),
        ("no_thinking.min_agreement", "no_thinking"),
    ],
)
def test_a_limit_on_what_is_not_measured_is_refused(name: str, part: str) -> None:
    with pytest.raises(InputError, match=f"{name}: there are no {part} to be compared with"):
        refuse_unmeasurable({"max_kl": 1.0, name: 1.0}, (), {part: False})
    refuse_unmeasurable({"max_kl": 1.0, name: 1.0}, (), {part: True})


@pytest.mark.parametrize("text", ["max_kl: 0.02\nmin_top1: 1\n", '{"max_kl": 0.02, "min_top1": 1}'])
def test_a_gate_file_is_yaml_or_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    limits = read_limits(tmp_path / "gate.yaml")
    assert limits == {"max_kl": 0.02, "min_top1": 1.0}
    assert all(type(value) is float for value in limits.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "0.02",
        "max_lk: 0.02",
        "domains: {math: {max_lk: 1}}",
        "domains: {math: 3}",
        "domains: {max_kl: 3}",
        "thinking: {math: {max_extra_loops: 3}}",
        "thinking: {max_kl: 3}",
        "max_bytes: 9 metres",
        "max_kl: high",
        "max_kl: true",
        "max_kl: [0.1]",
        "max_kl:",
        "3: 4",
        "max_kl: {",
        "when: 2024-99-99",
        "[" * 1000,
    ],
    ids=lambda text: text[:20],
)
def test_a_gate_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(InputError, match=r"gate\.yaml"):
        read_limits(tmp_path / "gate.yaml")


def test_an_unknown_limit_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("max_lk: 0.02")
    with pytest.raises(InputError, match=r"max_lk: 0\.02 is no limit") as caught:
        read_limits(tmp_path / "gate.yaml")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in LIMITS)


def test_a_missing_gate_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gate\.yaml: cannot be read"):
        read_limits(tmp_path / "gate.yaml")
