"""`gate`: whether an artifact is worse than its baseline in drift, size or latency.

Both reports scored the same rows of text, so differences are taken row by row: what both models find hard cancels out.
Resampling rows gives their 95 % interval. With `allowed` from the tolerances, the verdict on a difference is

    worse          the whole interval is above `allowed`
    same           the whole interval is within ± `allowed`
    better         the whole interval is below zero, and part of it below − `allowed`
    inconclusive   otherwise; with `strict` worse where the difference itself is above `allowed`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.files import read_json
from qwen3_export.errors import InputError
from qwen3_export.prove.latency_pairs import latency_pairs
from qwen3_export.prove.naming import unique_names
from qwen3_export.prove.pair import pair
from qwen3_export.prove.statistics import MIN_ROWS, ends, interval_of_few, resampled
from qwen3_export.prove.tolerance import DRIFT, Tolerance

_RANK = ("same", "better", "inconclusive", "worse")
# Fields that must be equal for rows to be comparable, and their names in messages.
_EQUAL = {
    "reference_sha256": "the original",
    "text_sha256": "the text",
    "kl_is_lower_bound": "the kind of reference (all logits, or the likeliest tokens)",
    "runtime": "the runtime",
    "device": "the device",
}
# Kinds of figures that a report may have and its baseline lack.
_KINDS = {"kl_mean": "drift", "decode": "latency", "bytes": "size"}
_WRITTEN = "give a folder that the --report of validate or bench wrote"
_AGAIN = "measure both with the same reference, text and runtime settings"


def read_report(path: Path) -> dict[str, Any]:
    """Read a report from its folder or report.json; InputError for anything else."""
    file = path / "report.json" if path.is_dir() else path
    values = read_json(file, hint=_WRITTEN)
    if not isinstance(values, dict) or not isinstance(values.get("results"), list):
        raise InputError(f"{file}: no report of validate or bench", _WRITTEN)
    _refuse_malformed(file, values)
    if not values["results"]:
        failed = values.get("failed")
        raise InputError(f"{file}: {'none of its artifacts was' if failed else 'nothing was'} measured", _WRITTEN)
    if not all(isinstance(item, dict) and isinstance(item.get("artifact"), str) for item in values["results"]):
        raise InputError(f"{file}: its results do not name their artifacts", _WRITTEN)
    return values


def _refuse_malformed(file: Path, values: Mapping[str, Any]) -> None:
    """Raise InputError where what a report may lack is there and of another form."""
    failed = values.get("failed")
    named = isinstance(failed, list) and all(
        isinstance(item, dict) and isinstance(item.get("artifact"), str) and isinstance(item.get("error"), str)
        for item in failed
    )
    if failed is not None and not named:
        raise InputError(f"{file}: failed is no list of artifacts and their errors", _WRITTEN)
    if not isinstance(values.get("environment", {}), dict):
        raise InputError(f"{file}: environment is no object", _WRITTEN)


def compare_with_baseline(
    report: Mapping[str, Any], baseline: Mapping[str, Any], tolerances: Mapping[str, Tolerance], strict: bool = False
) -> dict[str, Any]:
    """The result of `gate`: `{verdict, passed, pairs, …}`.

    Raises InputError when the reports cannot be compared.
    """
    pairs, unpaired = list[dict[str, Any]](), list[str]()
    _refuse_unmeasured(report)
    machines = [values.get("environment", {}).get("cpu") for values in (report, baseline)]
    for name, new, old in _pair_artifacts(report["results"], baseline["results"], unpaired):
        try:
            found = [
                *_drift_pairs(new, old, tolerances, strict),
                *latency_pairs(new, old, tolerances, strict, machines),
            ]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{name}: damaged report ({type(error).__name__}: {error})") from error
        if not found:
            raise InputError(f"{name}: the reports have no measurement in common", _AGAIN)
        unpaired += [f"{name}: {what}" for field, what in _KINDS.items() if field in new and field not in old]
        pairs += [{"artifact": name, **item} for item in found]
    verdict = max((item["verdict"] for item in pairs), key=_RANK.index)
    return {"verdict": verdict, "passed": verdict != "worse", "strict": strict, "pairs": pairs, "unpaired": unpaired}


def _refuse_unmeasured(report: Mapping[str, Any]) -> None:
    """Raise InputError for a report with an unmeasured artifact, which may be worse."""
    for item in report.get("failed") or ():
        what = f"{item['artifact']} was not measured"
        raise InputError(f"{what}, and may be worse: {item['error']}", "measure it again")


def _pair_artifacts(
    new: list[dict[str, Any]], old: list[dict[str, Any]], unpaired: list[str]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Pairs of results with the same artifact name.

    Two reports on one artifact each are paired whatever its names are.
    """
    names, old_names = (unique_names([item["artifact"] for item in items]) for items in (new, old))
    if len(new) == len(old) == 1:
        yield names[0], new[0], old[0]
        return
    known = dict(zip(old_names, old, strict=True))
    missing = [name for name in old_names if name not in names]
    if missing:
        raise InputError(f"{missing[0]}: the baseline has it, the report has not", f"the report has {', '.join(names)}")
    unpaired += [name for name in names if name not in known]
    for name, item in zip(names, new, strict=True):
        if name in known:
            yield name, item, known[name]


def _drift_pairs(
    new: Mapping[str, Any], old: Mapping[str, Any], tolerances: Mapping[str, Tolerance], strict: bool
) -> Iterator[dict[str, Any]]:
    if "kl_mean" in old and "kl_mean" not in new:
        raise InputError(f"{new['artifact']}: the baseline has its drift, the report has not", "run validate as well")
    if "kl_mean" in new and "kl_mean" in old:
        _refuse_unlike(new, old)
        rows = np.array(new["rows"]["domain"])
        for name in DRIFT:
            yield _paired(name, new, old, np.ones(len(rows), bool), tolerances[name], strict)
        for name in tolerances:
            section, _, rest = name.partition(".")
            if section == "domains":
                domain, _, metric = rest.rpartition(".")
                if domain not in rows:
                    raise InputError(
                        f"{name}: the text has no domain {domain!r}", f"it has {', '.join(sorted(set(rows)))}"
                    )
                yield {**_paired(metric, new, old, rows == domain, tolerances[name], strict), "metric": name}
    if "bytes" in old and "bytes" not in new:
        raise InputError(f"{new['artifact']}: the baseline has its size, the report has not", _AGAIN)
    if "bytes" in new and "bytes" in old:
        yield pair("bytes", old["bytes"], new["bytes"], None, tolerances["bytes"], strict)


def _refuse_unlike(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Raise InputError unless original, text and runtime settings are the same in both."""
    for item in (new, old):
        if "rows" not in item:
            raise InputError(
                f"{item['artifact']}: the report has no sums of its rows", "make it anew with this version"
            )
    for field, what in _EQUAL.items():
        if new.get(field) != old.get(field):
            raise InputError(f"{new['artifact']}: {what} differs: {new.get(field)}, baseline {old.get(field)}", _AGAIN)
    exact = [item.get("settings", {}).get("exact") for item in (new, old)]
    if exact[0] != exact[1]:
        raise InputError(
            f"{new['artifact']}: the runtime's exact mode differs: {exact[0]}, baseline {exact[1]}", _AGAIN
        )
    if any(new["rows"][key] != old["rows"][key] for key in ("positions", "domain")):
        raise InputError(f"{new['artifact']}: the rows of both reports are not the same", _AGAIN)


def _paired(
    metric: str,
    new: Mapping[str, Any],
    old: Mapping[str, Any],
    chosen: NDArray[np.bool_],
    tolerance: Tolerance,
    strict: bool,
) -> dict[str, Any]:
    """Compare one metric over the chosen rows, with the interval of the difference."""
    counts = np.array(new["rows"]["positions"])[chosen]
    ours, theirs = (_sums(metric, item["rows"])[chosen] for item in (new, old))
    value, before = (float(_figure(metric, sums.sum() / counts.sum())) for sums in (ours, theirs))
    if not np.isfinite([value, before]).all():
        raise ValueError(f"{metric} is no finite number")
    if 1 < len(counts) < MIN_ROWS:
        deviations = _deviations(metric, counts, ours) - _deviations(metric, counts, theirs)
        interval = interval_of_few(counts, value - before, deviations)
    else:
        draws = [_figure(metric, means) for means in resampled(counts, ours, theirs)]
        interval = ends(draws[0] - draws[1])
    alone = len(counts) == 1 and not np.array_equal(ours, theirs)
    reason = "one row is too few for an interval" if alone else None
    return pair(metric, before, value, interval, tolerance, strict, doubt=reason)


def _deviations(metric: str, counts: NDArray, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each row adds to a figure beyond its share, to first order."""
    mean = sums.sum() / counts.sum()
    slope = float(np.exp(mean)) if metric == "ppl_ratio" else 1.0
    return slope * (sums - mean * counts)


def _sums(metric: str, rows: Mapping[str, Any]) -> NDArray[np.float64]:
    if metric == "ppl_ratio":
        return np.array(rows["reference_logprob"], float) - np.array(rows["artifact_logprob"], float)
    return np.array(rows["kl" if metric == "kl_mean" else "same_top"], float)


def _figure(metric: str, mean: Any) -> Any:
    return np.exp(mean) if metric == "ppl_ratio" else mean
