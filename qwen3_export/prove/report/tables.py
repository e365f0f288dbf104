"""A result as tables of text, which report.md and report.html both show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qwen3_export.prove.gate import distinct, short
from qwen3_export.prove.limits import limit_named
from qwen3_export.prove.naming import unique_names
from qwen3_export.prove.report.generation import explanations, tasks, texts
from qwen3_export.prove.report.numbers import bytes_text, fixed, marked_kl, percent, signed, span
from qwen3_export.prove.report.table import ReportTable


def named(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """`(unique short name, result)` of every artifact that was measured."""
    return _named(result)[: len(result.get("results", []))]


def named_failures(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """`(unique short name, entry of failed)` of every artifact that could not be measured."""
    return _named(result)[len(result.get("results", [])) :]


def _named(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    items = [*result.get("results", []), *result.get("failed", [])]
    paths = [item["artifact"] for item in items]
    if any("node" in item for item in items):
        # The same artifact on several nodes is named after the node, not numbered.
        short = dict(zip(distinct := list(dict.fromkeys(paths)), unique_names(distinct), strict=True))
        nodes = [item["node"]["label"] or item["node"]["name"] or "a lost node" for item in items]
        paths = [f"{short[path]} on {node}" for path, node in zip(paths, nodes, strict=True)]
    return list(zip(unique_names(paths), items, strict=True))


def verdict_of(result: Mapping[str, Any]) -> str:
    """`pass`, `FAIL` or the gate's own word; `-` when no limit was given."""
    if "verdict" in result:
        return str(result["verdict"])
    if result.get("failed"):
        return "FAIL"
    if not any(item.get("gate", {}).get("checks") for item in result.get("results", [])):
        return "-"
    return "pass" if result["passed"] else "FAIL"


def tables(result: Mapping[str, Any]) -> Iterator[ReportTable]:
    """All tables that a result has data for."""
    items = named(result)
    drifts = [(name, item) for name, item in items if "kl_mean" in item]
    if result.get("pairs"):
        yield pairs_table(result)
    if result.get("candidates"):
        yield compare_table(result)
    if drifts:
        headers = ["artifact", "runtime", "size", "KL", "KL 95 %", "KL p99", "top-1", "ppl ratio", "verdict"]
        yield ReportTable("Drift", headers, [_drift_row(name, item) for name, item in drifts])
    if any(item.get("gate", {}).get("checks") for _, item in items):
        rows = [_check_row(name, check) for name, item in items for check in item.get("gate", {}).get("checks", ())]
        yield ReportTable("Checks", ["artifact", "check", "value", "95 %", "limit", "verdict"], rows)
    yield from _speeds([(name, item) for name, item in items if "decode" in item and "prefill" in item])
    for name, item in drifts:
        yield _domains(name, item)
    yield from _details(drifts)
    yield from texts(drifts)
    yield from tasks(drifts)
    yield from explanations(drifts)


def _drift_row(name: str, item: Mapping[str, Any]) -> list[str]:
    gate = item.get("gate", {})
    return [
        name,
        f"{item['runtime']} {item['runtime_version']}",
        bytes_text(item["bytes"]),
        marked_kl(item, 6),
        span(item["kl_ci95"]),
        fixed(item["kl_p99"], 5),
        fixed(item["top1_agreement"], 4),
        fixed(item["ppl_ratio"], 4),
        "-" if not gate.get("checks") else "pass" if gate["passed"] else "FAIL",
    ]


def _check_row(name: str, check: Mapping[str, Any]) -> list[str]:
    doubtful = "" if check.get("conclusive", True) else " (inconclusive)"
    size = _is_size(check["name"])
    write = bytes_text if size else short
    value, limit = "-" if check["value"] is None else write(check["value"]), write(check["limit"])
    if value == limit and check["value"] != check["limit"]:
        value, limit = distinct(check["value"], check["limit"])
    return [
        name,
        check["name"],
        value,
        span(check.get("ci95")),
        limit,
        f"{'pass' if check['passed'] else 'FAIL'}{doubtful}",
    ]


def _is_size(name: str) -> bool:
    limit = limit_named(name)
    return limit is not None and limit.kind == "bytes"


def _speeds(speeds: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[ReportTable]:
    if not speeds:
        return
    prefill = [
        [
            name,
            item["runtime"],
            str(one["prompt_tokens"]),
            fixed(one["tokens_per_second"], 0),
            fixed(one["seconds_p50"], 4),
            fixed(one["seconds_p95"], 4),
        ]
        for name, item in speeds
        for one in item["prefill"]
    ]
    yield ReportTable("Prefill", ["artifact", "runtime", "prompt", "prefill tok/s", "s p50", "s p95"], prefill)
    decode = [
        [
            name,
            fixed(item["decode"]["tokens_per_second_p50"], 1),
            *(fixed(1000 * item["decode"][key], 2) for key in ("per_token_seconds_p50", "p95", "p99")),
            fixed(item["load_seconds"], 2),
            bytes_text(item["peak_rss_bytes"]),
            percent((item.get("bandwidth") or {}).get("fraction")),
            str(item["threads"]),
        ]
        for name, item in speeds
    ]
    headers = [
        "artifact",
        "decode tok/s",
        "ms p50",
        "ms p95",
        "ms p99",
        "load s",
        "peak memory",
        "of bandwidth",
        "threads",
    ]
    yield ReportTable("Decode", headers, decode)


def _domains(name: str, item: Mapping[str, Any]) -> ReportTable:
    rows = [
        [
            domain,
            str(one["tokens"]),
            fixed(one["kl_mean"], 6),
            span(one.get("kl_ci95")),
            fixed(one["top1_agreement"], 4),
            fixed(one["ppl_ratio"], 4),
        ]
        for domain, one in item["domains"].items()
    ]
    return ReportTable(f"{name}: domains", ["domain", "tokens", "KL", "KL 95 %", "top-1", "ppl ratio"], rows)


def _details(drifts: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[ReportTable]:
    """The statistics of `llama-perplexity --kl-divergence`, one column per artifact."""
    with_statistics = [
        (name, item["statistics"]) for name, item in drifts if "kl_mean" in item and "statistics" in item
    ]
    full = [(name, found) for name, found in with_statistics if "mean" in found["kl"]]
    if not full:
        return
    estimates = {name: item["kl_estimate"] for name, item in drifts if item.get("kl_estimate")}
    lines: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("KL mean", lambda s: _with_error(s["kl"], 6)),
        *((f"KL {label}", partial(_quantile, "kl", key)) for key, label in _QUANTILES.items()),
        ("Δp mean", lambda s: f"{_with_error(s['probability_change'], 3, 100)} %"),
        ("Δp RMS", lambda s: f"{_with_error(s['probability_change'], 3, 100, 'rms', 'rms_stderr')} %"),
        *((f"Δp {label}", partial(_change_quantile, key)) for key, label in _CHANGES.items()),
        ("same top token", lambda s: f"{_with_error(s['same_top'], 3, 100)} %"),
        ("ppl ratio", lambda s: _with_error(s["ppl_ratio"], 6)),
        ("ln ppl ratio", lambda s: _with_error(s["log_ppl_ratio"], 6)),
        ("ppl difference", lambda s: _with_error(s["ppl_difference"], 4)),
        ("correlation of log-probabilities", lambda s: percent(s["logprob_correlation"])),
    ]
    rows = [[label, *(show(found) for _, found in full)] for label, show in lines]
    if estimates:
        # After the mean: the standard error of drawing tokens, and the lower bound.
        for label, key in (("KL at least", "lower_bound"), ("KL, error of the estimate", "stderr")):
            cells = [fixed(estimates[name][key], 6) if name in estimates else "exact" for name, _ in full]
            rows.insert(1, [label, *cells])
    yield ReportTable("Statistics (± as llama-perplexity prints it)", ["statistic", *(name for name, _ in full)], rows)


_QUANTILES = {"max": "max", "p99_9": "p99.9", "p99": "p99", "p95": "p95", "median": "median", "p5": "p5", "min": "min"}


_CHANGES = {"max": "max", "p95": "p95", "median": "median", "p5": "p5", "min": "min"}


def _quantile(section: str, key: str, values: Mapping[str, Any]) -> str:
    return fixed(values[section][key], 6)


def _change_quantile(key: str, values: Mapping[str, Any]) -> str:
    return f"{fixed(100 * values['probability_change'][key], 3)} %"


def _with_error(
    values: Mapping[str, float], digits: int, scale: float = 1, mean: str = "mean", error: str = "stderr"
) -> str:
    return f"{fixed(scale * values[mean], digits)} ± {fixed(scale * values[error], digits)}"


def pairs_table(result: Mapping[str, Any]) -> ReportTable:
    """A table of every metric beside its baseline."""
    rows = [
        [
            item["artifact"],
            item["metric"],
            short(item["baseline"]),
            short(item["value"]),
            _change(item["delta"], item["metric"]),
            f"{_change(item['ci95'][0], item['metric'])} … {_change(item['ci95'][1], item['metric'])}",
            _change(item["allowed"], item["metric"]).removeprefix("+"),
            item["verdict"],
        ]
        for item in result["pairs"]
    ]
    headers = ["artifact", "metric", "baseline", "value", "change", "95 %", "allowed", "verdict"]
    return ReportTable("Against the baseline", headers, rows)


def _change(value: float, metric: str) -> str:
    return signed(value, 0) if metric in ("bytes", "peak_rss_bytes") else signed(value, 6)


def compare_table(result: Mapping[str, Any]) -> ReportTable:
    """A table of all candidates; `●` marks the Pareto front."""
    rows = [
        [
            item["name"],
            item["report"],
            item["runtime"],
            "-" if item["bytes"] is None else bytes_text(item["bytes"]),
            "-" if item["kl_mean"] is None else marked_kl(item, 6),
            "-" if item["top1_agreement"] is None else fixed(item["top1_agreement"], 4),
            "-" if item["tokens_per_second"] is None else fixed(item["tokens_per_second"], 1),
            "-" if item["peak_rss_bytes"] is None else bytes_text(item["peak_rss_bytes"]),
            "●" if item["pareto"] else "",
        ]
        for item in result["candidates"]
    ]
    headers = ["artifact", "report", "runtime", "size", "KL", "top-1", "decode tok/s", "peak memory", "Pareto"]
    return ReportTable("Candidates", headers, rows)
