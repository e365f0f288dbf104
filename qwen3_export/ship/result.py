"""Checks, provenance and results that all exports share."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.coverage import read_coverage
from qwen3_export.core.manifest import manifest_text, read_manifest
from qwen3_export.core.onnx_header import read_onnx_header
from qwen3_export.core.progress import peak_rss_bytes
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.exactness import Inexact

Supports = Callable[[QuantScheme], str | None]
_LINEAR = re.compile(r"layer\.\d+\..*(_proj|experts)")
# `model.onnx.data`, its later shards, and the names of transformers.js.
_DATA = re.compile(r"\.onnx[._]data(_\d+)?$")


def check_schemes(
    checkpoint: Checkpoint,
    supports: Supports,
    target: str,
    supports_experts: Supports | None = None,
    elsewhere: Callable[[QuantScheme], str | None] = lambda scheme: None,
) -> None:
    """Raise UnsupportedError for the first tensor that a target cannot hold.

    `supports_experts` is the rule for experts, where it is another one. `elsewhere` says what holds a scheme as it is.
    """
    reasons: dict[tuple[QuantScheme, bool], str | None] = {}
    for name, scheme in checkpoint.schemes.items():
        expert = supports_experts is not None and is_expert(name)
        if (scheme, expert) not in reasons:
            reasons[scheme, expert] = supports_experts(scheme) if expert and supports_experts else supports(scheme)
        if reason := reasons[scheme, expert]:
            raise UnsupportedError(
                f"{name} ({scheme.label}) cannot be exported to {target}: {reason}",
                (None if expert else elsewhere(scheme))
                or "quantize again with a recipe that fits, e.g. gptq-w4a16-g128 or gptq-w4a16-g32",
            )
    for name in checkpoint.schemes:
        if name in checkpoint.reordered:
            raise UnsupportedError(
                f"{name} cannot be exported to {target}: its groups are not consecutive inputs (g_idx, from desc_act)",
                "quantize the 16-bit original with gptq-w4a16-g128, whose act_order needs no g_idx, or with "
                "desc_act: false; the folder itself runs as it is",
            )


def not_integer(scheme: QuantScheme) -> str | None:
    """Why an export for integer weights cannot hold a scheme; None if it can."""
    if scheme.ggml_type is not None:
        return f"{scheme.ggml_type} is a block type of ggml, which llama.cpp alone runs; `qwen3-export gguf` writes it"
    if scheme.type == "float":
        return f"its {scheme.num_bits}-bit floats have no exact place there; the folder itself runs in vLLM and SGLang"
    if scheme.activations:
        return f"activations rounded by {scheme.activations} have no place there; the folder itself runs in vLLM"
    return None


def provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """The origin of an artifact, for its manifest."""
    manifest = read_manifest(checkpoint.folder)
    if source := manifest.get("source"):
        manifest_text(checkpoint.folder, manifest, "source", "sha256")
    origin = {
        "source": source or {"name": checkpoint.name, "sha256": checkpoint.sha256},
        "experts": read_coverage(checkpoint.folder),
    }
    if not checkpoint.schemes:
        return {**origin, "quantized": None}
    foreign = checkpoint.quantization.get("quant_method")
    recipe = f"{foreign} of another tool" if foreign else manifest_text(checkpoint.folder, manifest, "recipe", "name")
    return {**origin, "quantized": {"sha256": checkpoint.sha256, "recipe": recipe}}


def exactness(inexact: list[Inexact]) -> dict[str, Any]:
    """The fields `exact` and `inexact_tensors` of a result."""
    return {"exact": not inexact, "inexact_tensors": inexact}


def onnx_linear_bytes(folder: Path) -> int:
    """Bytes of the decoder's linears in an ONNX folder of ours.

    Codes with their scales and zero points, or weights.
    """
    graph = next(path for path in (folder / "model.onnx", *sorted(folder.glob("onnx/*.onnx"))) if path.is_file())
    return sum(tensor.bytes for tensor in read_onnx_header(graph).tensors if _LINEAR.match(tensor.name))


def export_result(
    output: Path,
    files: list[dict[str, Any]],
    checkpoint: Checkpoint,
    inexact: list[Inexact],
    started: float,
    linear_bytes: int,
    tensor_bytes: int | None = None,
) -> dict[str, Any]:
    """The JSON object of an export command.

    `linear_bytes` are what the decoder's linears take in the artifact, `tensor_bytes` what all tensors take. The latter
    are by default the files that hold nothing else.
    """
    data = sum(item["bytes"] for item in files if _DATA.search(item["path"]))
    weights = data if tensor_bytes is None else tensor_bytes
    return {
        "output": str(output),
        "files": files,
        "bits_per_weight": 8 * weights / checkpoint.config.num_parameters,
        "linear_bits_per_weight": 8 * linear_bytes / sum(map(math.prod, checkpoint.config.all_linears().values())),
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        **exactness(inexact),
    }
