"""The limits of a gate file, and the refusal of impossible ones.

    max_kl: 0.02                     of the whole artifact
    max_bytes: 9MB
    domains: {math: {max_kl: 0.02}}  of one domain of the text
    thinking: {max_extra_loops: 0}   of the greedy texts in thinking mode; also `no_thinking`
    max_peak_memory: 500MiB          of a latency run

A limit has a dotted name, such as `domains.math.max_kl`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_yaml
from qwen3_export.core.units import parse_size
from qwen3_export.errors import InputError


@dataclass(frozen=True)
class Limit:
    """One limit: the path of its value in a result, direction and kind.

    `kind` is `share` (0 to 1), `amount` (0 or more), `positive` or `bytes`. `interval` names the field of the value's
    95 % interval, where there is one.
    """

    path: str
    at_most: bool
    kind: str = "amount"
    interval: str | None = None


_DRIFT = {
    "max_kl": Limit("kl_mean", True, interval="kl_ci95"),
    "min_top1": Limit("top1_agreement", False, "share", "top1_ci95"),
    "max_ppl_ratio": Limit("ppl_ratio", True, "positive", "ppl_ratio_ci95"),
}
_WHOLE = {
    **_DRIFT,
    "max_kl_median": Limit("statistics.kl.median", True),
    "max_kl_p99": Limit("kl_p99", True),
    "max_kl_p999": Limit("statistics.kl.p99_9", True),
    "max_kl_max": Limit("statistics.kl.max", True),
    "max_delta_p_rms": Limit("statistics.probability_change.rms", True, "share"),
    "max_bytes": Limit("bytes", True, "bytes"),
    "max_extra_loops": Limit("generation.extra_loops", True),
    "max_flip_share": Limit("flips.share", True, "share"),
    "max_right_to_wrong": Limit("tasks.right_to_wrong", True),
    "max_changed_sidecars": Limit("sidecars.changed", True),
    "min_expert_tokens": Limit("experts.min_tokens", False),
    "max_experts_below_floor": Limit("experts.below_floor", True),
}
_LATENCY = {
    "min_decode_tokens_per_second": Limit("decode.tokens_per_second_p50", False, "positive"),
    "max_first_token_seconds": Limit("first_token.seconds_p50", True, "positive"),
    "max_peak_memory": Limit("peak_rss_bytes", True, "bytes"),
}
_TEXTS = {
    "max_extra_loops": Limit("extra_loops", True),
    "min_agreement": Limit("agreement", False, "share"),
}
LIMITS: dict[str, Limit] = {**_WHOLE, **_LATENCY}
_MODES = ("thinking", "no_thinking")


def limit_named(name: str) -> Limit | None:
    """The limit with a dotted name, None when there is none."""
    section, *rest = name.split(".")
    if not rest:
        return LIMITS.get(name)
    inner = _DRIFT if section == "domains" and len(rest) > 1 else _TEXTS if section in _MODES else {}
    # A domain's name may itself contain dots.
    limit, where = inner.get(rest[-1]), ".".join(rest[:-1])
    if limit is None or (section in _MODES and where):
        return None
    prefix = f"domains.{where}" if section == "domains" else f"generation.{section}"
    return Limit(f"{prefix}.{limit.path}", limit.at_most, limit.kind, limit.interval and f"{prefix}.{limit.interval}")


def is_latency(name: str) -> bool:
    """Whether a limit is on a figure of `bench`."""
    return name in _LATENCY


def read_limits(path: Path) -> dict[str, float]:
    """Read a gate file, YAML or JSON: `{dotted name: limit}`.

    Raises InputError when malformed or impossible.
    """
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: a mapping of limits was expected", _known())
    limits: dict[str, float] = {}
    for name, value in _flat(values):
        if name in limits:
            raise InputError(f"{path}: {name} is given twice, as one name and nested", "keep one of the two")
        limits[name] = parse_limit(name, value, f"{path}: ")
    return limits


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value and prefix.count(".") < 2:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _known() -> str:
    inner = f"domains: {{NAME: {{{', '.join(_DRIFT)}}}}}, thinking and no_thinking: {{{', '.join(_TEXTS)}}}"
    return f"known limits: {', '.join(LIMITS)}; {inner}"


def parse_limit(name: str, value: object, where: str = "") -> float:
    """A limit's value as a number.

    Raises InputError when the limit is unknown, the value is not a number, or every result or none would meet it.
    """
    limit = limit_named(name)
    number = parse_number(value, size=limit is not None and limit.kind == "bytes")
    if limit is None or isinstance(number, bool) or not isinstance(number, int | float):
        size = limit is not None and limit.kind == "bytes"
        raise InputError(
            f"{where}{name}: {value!r} is no limit", "a size such as 9MB was expected" if size else _known()
        )
    reason = _impossible(limit, float(number))
    if reason:
        raise InputError(f"{where}{name}: {value} cannot be a limit: {reason[0]}", reason[1])
    return float(number)


def parse_number(value: object, size: bool) -> object:
    """A value as a number, with `size` also a size such as 9MB.

    Numbers may be texts: YAML reads `1e-3` as one.
    """
    if not isinstance(value, str):
        return value
    found = parse_size(value) if size else None
    try:
        return float(value) if found is None else found
    except ValueError:
        return value


def _impossible(limit: Limit, number: float) -> tuple[str, str | None] | None:
    """Why every result, or none, would meet a limit; None for a meaningful one."""
    if not math.isfinite(number):
        return "a finite number was expected", None
    if limit.kind == "share" and not 0 <= number <= 1:
        meant = f"{number / 100:g} for {number:g} %" if 1 < number <= 100 else None
        return "it limits a share, which lies between 0 and 1", meant
    if limit.kind in ("positive", "bytes") and number <= 0:
        return "what it limits is always above 0", None
    if number < 0:
        return "what it limits is never below 0", None
    return None


def refuse_unmeasurable(limits: Mapping[str, float], domains: tuple[str, ...], measured: Mapping[str, bool]) -> None:
    """Raise InputError for a limit on a value that will not be measured.

    `domains` are those of the reference's text. `measured` says whether `tasks`, `sidecars`, `thinking` and
    `no_thinking` will be measured; values that it does not name will be.
    """
    known = sorted(set(domains))
    for name in limits:
        limit = limit_named(name)
        if limit is None:
            raise InputError(f"{name}: no such limit", _known())
        section, _, rest = limit.path.partition(".")
        if section == "domains" and (domain := rest.rsplit(".", 1)[0]) not in known:
            raise InputError(f"{name}: the reference's text has no domain {domain!r}", f"it has {', '.join(known)}")
        part = rest.partition(".")[0] if section == "generation" else section
        if not measured.get(part, True):
            remedy = "give --tasks FILE" if part == "tasks" else "write the reference anew with this version"
            raise InputError(f"{name}: there are no {part} to be compared with", remedy)


def refuse_without_experts(limits: Mapping[str, float], artifact: Path, experts: Mapping[str, Any] | None) -> None:
    """Raise InputError for a limit on experts when the model has none."""
    for name in limits:
        limit = limit_named(name)
        if limit and limit.path.startswith("experts.") and experts is None:
            raise InputError(
                f"{name}: {artifact} is a dense model, it has no experts", "leave this limit away for dense models"
            )
