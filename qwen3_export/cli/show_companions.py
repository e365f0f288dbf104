"""Prints what `inspect` found in the files that `companions` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from qwen3_export.cli.console import fields, nats, size, table, tell, yaml_text


def show_companion(values: dict[str, Any]) -> None:
    """Print what was found, as lines and a table."""
    _SHOWN[values["kind"]](values)


def _show_reference(values: dict[str, Any]) -> None:
    kept, judged = "all logits", "full"
    if values["top_k"]:
        kept = f"the {values['top_k']} likeliest tokens of every position"
        kept += f" and {values['drawn']} others, drawn" if values["drawn"] else ""
        judged = "a lower bound" if values["kl_is_lower_bound"] else "estimated"
    budget = f", thoughts of {values['thinking_budget']} tokens" if values["thinking_budget"] else ""
    fields(
        {
            "artifact": values["artifact"],
            "kind": "reference file: the original's answers, for validate",
            "original": f"{values['source']} (SHA-256 {values['source_sha256']})",
            "vocabulary": f"{values['vocab_size']} tokens",
            "text": f"{values['rows']} rows, {values['tokens']} tokens",
            "positions": f"{values['positions']} scored",
            "keeps": f"{kept} (KL is {judged})",
            "greedy texts": f"{values['texts']} plain, {values['chats']} chats{budget}",
            "chat template": "kept, to compare" if values["sidecars"] else "none",
            **({"tasks": f"{values['tasks']}, {values['tasks_right']} right"} if values["tasks"] else {}),
            "size": size(values["bytes"]),
        }
    )
    table(["domain", "positions"], [[name, str(count)] for name, count in values["domains"].items()])


def _show_imatrix(values: dict[str, Any]) -> None:
    length = f" of {values['sequence_length']} tokens" if values["sequence_length"] else ""
    text = ", ".join(values["datasets"]) or "not said of what"
    fields(
        {
            "artifact": values["artifact"],
            "kind": f"importance matrix ({values['form']}), for gguf --imatrix and llama-quantize",
            "measured on": f"{values['samples']} samples{length} ({text})",
            **values["provenance"],
            "size": size(values["bytes"]),
        }
    )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tensor in values["tensors"]:
        shape = " × ".join(map(str, tensor["shape"]))
        groups.setdefault((re.sub(r"\d+", "*", tensor["name"]), shape), []).append(tensor)
    rows = [
        [name, str(len(items)), shape, f"{min(i['fewest'] for i in items):.0f}", f"{max(i['most'] for i in items):.0f}"]
        for (name, shape), items in groups.items()
    ]
    counted = "tokens" if values["form"] == "GGUF" else "calls"
    table(["tensor", "count", "matrices × inputs", f"fewest {counted}", f"most {counted}"], rows)


def _show_report(values: dict[str, Any]) -> None:
    machine = values["environment"].get("cpu") if isinstance(values["environment"], dict) else None
    passed = {True: "passed", False: "failed"}.get(values["passed"], "nothing was asked")
    fields(
        {
            "artifact": values["artifact"],
            "kind": "report",
            "title": values["title"] or "-",
            "verdict": values["verdict"] or passed,
            **({"machine": machine} if machine else {}),
            "files": ", ".join(values["files"]),
        }
    )
    in_a_lab = any(item["node"] for item in values["artifacts"])
    rows = [
        [
            item["artifact"],
            *([item["node"] or "-"] if in_a_lab else ()),
            item["runtime"] or "-",
            "-" if item["bytes"] is None else size(item["bytes"]),
            "-" if item["kl_mean"] is None else nats(item),
            "-" if item["tokens_per_second"] is None else f"{item['tokens_per_second']:.0f}",
        ]
        for item in values["artifacts"]
    ]
    table(["artifact", *(["node"] if in_a_lab else ()), "runtime", "size", "KL (nats)", "decode tok/s"], rows)
    for item in values["artifacts"]:
        if item["error"]:
            where = f" ({item['node']})" if item["node"] else ""
            tell(f"{item['artifact']}{where}: not measured: {item['error']}")


def _show_triton(values: dict[str, Any]) -> None:
    made = {key: json.dumps(v) if isinstance(v, dict) else v for key, v in values["provenance"].items()}
    made = {("made of" if key == "artifact" else key): value for key, value in made.items()}
    fields(
        {
            "artifact": values["artifact"],
            "kind": "model repository of Triton Inference Server",
            **made,
            "size": size(values["bytes"]),
        }
    )
    rows = [
        [
            item["name"],
            item["backend"] or "-",
            str(item["instances"]),
            *(item["parameters"].get(key, "-") for key in ("sequences", "queue")),
            size(item["bytes"]),
        ]
        for item in values["models"]
    ]
    table(["model", "backend", "instances", "sequences", "queue", "size"], rows)


def _show_demo(values: dict[str, Any]) -> None:
    fields({"artifact": values["artifact"], "kind": "what `demo` made", "size": size(values["bytes"])})
    table(["artifact", ""], [[name, ""] for name in [*values["artifacts"], "report"]])


def _show_recipe(values: dict[str, Any]) -> None:
    fields({"artifact": values["artifact"], "kind": "recipe"})
    print()
    print(yaml_text(values["recipe"]), end="")


_SHOWN: dict[str, Callable[[dict[str, Any]], None]] = {
    "reference": _show_reference,
    "importance matrix": _show_imatrix,
    "report": _show_report,
    "Triton repository": _show_triton,
    "demo": _show_demo,
    "recipe": _show_recipe,
}
