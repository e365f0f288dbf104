"""report.xml: every check of a gate as a test case, in JUnit's format."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from typing import Any

from qwen3_export.prove.gate import explain, number
from qwen3_export.prove.report.tables import named, named_failures


def junit(result: Mapping[str, Any], title: str = "Validation") -> bytes:
    """JUnit XML with a case per check.

    An artifact without limits passes one; one that could not be measured has an error.
    """
    suite = ElementTree.Element("testsuite", name=f"qwen3-export: {title}")
    cases = list(_cases(result))
    for owner, name, seconds, facts, failure in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=owner, name=name, time=f"{seconds:.3f}")
        properties = ElementTree.SubElement(case, "properties")
        for key, value in facts.items():
            ElementTree.SubElement(properties, "property", name=key, value=value)
        if failure:
            ElementTree.SubElement(case, "failure", message=failure)
    unmeasured = named_failures(result)
    for owner, item in unmeasured:
        case = ElementTree.SubElement(suite, "testcase", classname=owner, name="measured", time="0.000")
        ElementTree.SubElement(case, "error", message=item["error"])
    suite.set("tests", str(len(cases) + len(unmeasured)))
    suite.set("errors", str(len(unmeasured)))
    suite.set("failures", str(sum(bool(failure) for *_, failure in cases)))
    suite.set("time", f"{sum(seconds for _, _, seconds, _, _ in cases):.3f}")
    environment = result.get("environment") or {}
    if "date" in environment:
        suite.set("timestamp", environment["date"].removesuffix("+00:00"))
    if "host" in environment:
        suite.set("hostname", environment["host"])
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def _cases(result: Mapping[str, Any]) -> Iterator[tuple[str, str, float, dict[str, str], str | None]]:
    """Yield `(class, name, seconds, properties, failure)` for every case.

    An artifact's seconds are split evenly between its checks, so that they add up.
    """
    for owner, item in named(result):
        checks = item.get("gate", {}).get("checks") or [None]
        seconds = item.get("seconds", 0.0) / len(checks)
        for check in checks:
            if check is None:
                yield owner, "measured", seconds, {"limit": "-"}, None
            else:
                facts = {"value": _text(check["value"]), "limit": _text(check["limit"])}
                yield owner, check["name"], seconds, facts, None if check["passed"] else explain(check)
    for pair in result.get("pairs", ()):
        facts = {key: _text(pair[key]) for key in ("baseline", "value", "delta", "allowed")}
        facts["verdict"] = pair["verdict"]
        message = f"{pair['metric']} went from {facts['baseline']} to {facts['value']}, {facts['allowed']} is allowed"
        yield pair["artifact"], pair["metric"], 0.0, facts, message if pair["verdict"] == "worse" else None


def _text(value: float | None) -> str:
    return "-" if value is None else number(value)
