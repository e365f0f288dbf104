"""What `validate` prints for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_export.cli.console import nats, table, tell, verdict


def validated(result: dict[str, Any]) -> None:
    """Print the table of `validate`, and notes on each artifact."""
    from qwen3_export.prove.report.numbers import span
    from qwen3_export.prove.report.tables import named

    rows = [
        [
            name,
            item["runtime"],
            str(item["tokens"]),
            nats(item),
            span(item["kl_ci95"], 5),
            f"{100 * item['top1_agreement']:.2f} %",
            f"{item['ppl_ratio']:.4f}",
            f"{item['generation']['loops']}/{item['generation']['loops_reference']}",
            verdict(item),
        ]
        for name, item in named(result)
    ]
    headers = [
        "artifact",
        "runtime",
        "tokens",
        "KL (nats)",
        "95 %",
        "top-1",
        "ppl ratio",
        "loops/original's",
        "verdict",
    ]
    if rows:
        table(headers, rows)
    failed_notes(result)
    for name, item in named(result):
        _notes(name, item)


def _notes(name: str, item: Mapping[str, Any]) -> None:
    """Print what the table does not show of an artifact."""
    from qwen3_export.prove.gate import doubt, explain

    plan_note(name, item)
    if "explain" in item:
        _explained(name, item["explain"])
    if "tasks" in item:
        tell(f"{name}: {_tasks(item['tasks'])}")
    for check in item["gate"]["checks"]:
        if not check["passed"]:
            tell(f"{name}: {explain(check)}")
        elif doubt(check):
            tell(f"{name}: passed, but {doubt(check)}")


def failed_notes(result: Mapping[str, Any]) -> None:
    """Print why artifacts could not be measured."""
    from qwen3_export.prove.report.tables import named_failures

    for name, item in named_failures(result):
        tell(f"{name}: not measured: {item['error']}")


def plan_note(artifact: str, item: Mapping[str, Any]) -> None:
    """Print why an ONNX ran in place of its TensorRT plan, if it did."""
    from qwen3_export.run.artifact import plan_line

    if line := plan_line(artifact, item):
        tell(line)


def _explained(artifact: str, found: Mapping[str, Any]) -> None:
    """Print where drift comes from: a table of blocks, then the worst linears."""
    tell(f"{artifact}: error of the hidden state after each block, and what each block adds alone")
    table(
        ["block", "", "error", "alone"],
        [[str(b["block"]), "", f"{b['error']:.4f}", f"{b['own_error']:.4f}"] for b in found["blocks"]],
    )
    if found["folded"]:
        tell("scales were moved between neighbours: single linears cannot be compared")
    for one in found["linears"][:5]:
        tell(f"{one['name']}: relative error {one['error']:.4f}")


def _tasks(found: dict[str, Any]) -> str:
    low, high = found["lost_share_ci95"]
    return (
        f"the original gets {found['original_right']} of {found['tasks']} tasks right, this {found['artifact_right']}; "
        f"{found['right_to_wrong']} from right to wrong, {found['wrong_to_right']} the other way "
        f"(lost {found['lost_share']:.1%}, 95 % {low:.1%} … {high:.1%})"
    )
