"""Summaries of `onnx`, `gguf` and `tensorrt` in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_export.cli.console import fields, size
from qwen3_export.core.gguf_fallbacks import Fallbacks


def exported(result: dict[str, Any]) -> None:
    """Print the summary of an export."""
    inexact, linears = result["inexact_tensors"], result["linear_bits_per_weight"]
    worst = max(inexact, key=lambda item: item["max_rel_error"]) if inexact else None
    fields(
        {
            "output": result["output"],
            "size": size(sum(item["bytes"] for item in result["files"])),
            "bits per weight": f"{result['bits_per_weight']:.2f} in all, {linears:.2f} linears",
            "exact": "every number of the source arrived unchanged"
            if worst is None
            else f"no: {len(inexact)} tensors changed, at most {worst['max_rel_error']:.1e} ({worst['name']})",
            **(
                {"shards": len(result["files"])}
                if result["output"].endswith(".gguf") and len(result["files"]) > 1
                else {}
            ),
            **({"requantized": _requantized(result["requantized"])} if "requantized" in result else {}),
            **Fallbacks.of(result).summary(),
            **_costs(result),
            **_plan(result),
            "time": f"{result['seconds']:.1f} s",
            "peak memory": size(result["peak_rss_bytes"]),
        }
    )


def _requantized(tensors: Sequence[Mapping[str, Any]]) -> str:
    """From which scheme to which type codes were rounded again, and at what cost."""
    errors: dict[tuple[str, str], list[float]] = {}
    for item in tensors:
        errors.setdefault((item["from"], item["to"]), []).append(item["max_rel_error"])
    pairs = [
        f"{len(found)} from {old} to {new}, relative error up to {max(found):.1e}"
        for (old, new), found in errors.items()
    ]
    return f"{len(tensors)} tensors: {'; '.join(pairs)}"


def _costs(result: dict[str, Any]) -> dict[str, str]:
    """Lines of the summary: KL that a quantized cache and the accuracy level add."""
    cache = {}
    if "kv_cache_kl" in result:
        cache["cache"] = f"{result['kv_cache']} keys and values; adds a KL of {result['kv_cache_kl']:.1e}"
    return {**_level(result), **cache, **_experts(result)}


def _experts(result: dict[str, Any]) -> dict[str, str]:
    """Line of the summary: the operators that experts became.

    It has the reason where that is the slower one.
    """
    found = result.get("expert_layers") or ()
    parts = [f"{len(item['layers'])} layers as {item['operator']}{_because(item['reason'])}" for item in found]
    return {"experts": "; ".join(parts)} if parts else {}


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _plan(result: dict[str, Any]) -> dict[str, str]:
    """Line of the summary: the plan's cost beside its prediction, or its `trtexec` command."""
    if "trtexec" in result:
        return {"build on its device": result["trtexec"]}
    if "build" not in result:
        return {}
    built, predicted = result["build"], result["build"]["predicted"]
    return {
        "plan built in": f"{built['seconds']:.0f} s, {built['cpu_seconds']:.0f} s of processor time (predicted "
        f"{predicted['seconds']:.0f} s), {size(built['peak_rss_bytes'])} of memory (predicted "
        f"{size(predicted['peak_rss_bytes'])})"
    }


def _level(result: dict[str, Any]) -> dict[str, str]:
    """Line of the summary: the KL that the accuracy level adds."""
    level = result.get("accuracy_level")
    if level is None:
        return {}
    if level == 0:
        return {"accuracy level": "0, activations as they are"}
    cost = result.get("added_kl")
    measured = f"adds a KL of {cost:.1e}" if cost is not None else f"not measured: {result.get('added_kl_reason')}"
    return {"accuracy level": f"{level}, activations rounded to int8; {measured} (--accuracy-level 0 is exact)"}
