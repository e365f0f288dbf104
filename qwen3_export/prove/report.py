"""A report folder: report.json for machines, report.md for people, report.xml (JUnit) for CI."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_export.core.manifest import staged_folder, to_json, write_manifest
from qwen3_export.prove.gate import explain


def write_report(folder: Path, result: Mapping[str, Any], force: bool = False, title: str = "Validation") -> None:
    """Write a `validate`, `bench` or demo result; InputError when the folder exists."""
    with staged_folder(folder, force) as partial:
        (partial / "report.json").write_text(to_json(result), encoding="utf-8")
        (partial / "report.md").write_text(markdown(result, title), encoding="utf-8")
        (partial / "report.xml").write_bytes(junit(result))
        write_manifest(partial, "report", {"title": title})


def markdown(result: Mapping[str, Any], title: str) -> str:
    """The tables of a result, one per kind of measurement, with per-domain drift below."""
    lines = [f"# {title}", ""]
    drifts = [item for item in result["results"] if "kl_mean" in item]
    speeds = [item for item in result["results"] if "decode" in item]
    if drifts:
        lines += _table(
            ["artifact", "runtime", "bytes", "KL", "KL 95 %", "KL p99", "top-1", "ppl ratio", "verdict"],
            [_drift_row(item) for item in drifts],
        )
    if speeds:
        headers = [
            "artifact",
            "runtime",
            "prompt",
            "prefill tok/s",
            "decode tok/s",
            "p99 s/tok",
            "load s",
            "peak bytes",
        ]
        lines += _table(headers, [row for item in speeds for row in _speed_rows(item)])
    for item in drifts:
        lines += [f"## {_name(item)}", ""]
        rows = [
            [name, str(d["tokens"]), f"{d['kl_mean']:.6f}", f"{d['top1_agreement']:.4f}", f"{d['ppl_ratio']:.4f}"]
            for name, d in item["domains"].items()
        ]
        lines += _table(["domain", "tokens", "KL", "top-1", "ppl ratio"], rows)
    return "\n".join(lines) + "\n"


def _name(item: Mapping[str, Any]) -> str:
    return Path(item["artifact"]).name


def _drift_row(item: Mapping[str, Any]) -> list[str]:
    low, high = item["kl_ci95"]
    return [
        _name(item),
        f"{item['runtime']} {item['runtime_version']}",
        str(item["bytes"]),
        f"{'≥ ' if item.get('kl_is_lower_bound') else ''}{item['kl_mean']:.6f}",
        f"{low:.6f} … {high:.6f}",
        f"{item['kl_p99']:.5f}",
        f"{item['top1_agreement']:.4f}",
        f"{item['ppl_ratio']:.4f}",
        "pass" if item["gate"]["passed"] else "FAIL",
    ]


def _speed_rows(item: Mapping[str, Any]) -> list[list[str]]:
    decode = item["decode"]
    return [
        [
            _name(item),
            item["runtime"],
            str(prefill["prompt_tokens"]),
            f"{prefill['tokens_per_second']:.0f}",
            f"{decode['tokens_per_second_p50']:.1f}",
            f"{decode['p99']:.5f}",
            f"{item['load_seconds']:.2f}",
            str(item["peak_rss_bytes"]),
        ]
        for prefill in item["prefill"]
    ]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def junit(result: Mapping[str, Any]) -> bytes:
    """One test case per check of a gate; an artifact without limits is one case that passes."""
    suite = ElementTree.Element("testsuite", name="qwen3-export")
    failures = 0
    for item in result["results"]:
        checks = item.get("gate", {}).get("checks") or [{"name": "measured", "passed": True}]
        for check in checks:
            case = ElementTree.SubElement(suite, "testcase", classname=_name(item), name=check["name"])
            if not check["passed"]:
                failures += 1
                ElementTree.SubElement(case, "failure", message=explain(check))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(failures))
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
