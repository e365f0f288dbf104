"""What every runtime can run: a format, and rules of its own.

    transformers, vllm, sglang      the quantized folder
    onnxruntime, onnxruntime-genai  the ONNX folder
    llama.cpp                       the GGUF file
    tensorrt-rtx                    the plan
    torch                           any folder, dequantized: this package's own forward pass

vLLM and SGLang multiply q, k, v and gate, up as one matrix each, so these need one scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import EMBEDDING, block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.source import open_source
from qwen3_export.errors import UnsupportedError
from qwen3_export.preflight.formats import EXPORTS, Verdict

Verdicts = Mapping[str, Verdict]
Rule = Callable[[Checkpoint, Verdicts], str | None]


def _reads(*formats: str) -> Rule:
    """The rule of a runtime that runs everything that one of these formats holds."""

    def rule(_quantized: Checkpoint, found: Verdicts) -> str | None:
        reasons = [f"{name}: {found[name].reason}" for name in formats]
        return None if any(found[name].reason is None for name in formats) else reasons[0]

    return rule


def _transformers(quantized: Checkpoint, found: Verdicts) -> str | None:
    for name, scheme in quantized.schemes.items():
        if scheme.ggml_type is not None:
            return f"{name} ({scheme.label}): transformers computes with no block type of ggml"
    return _reads(*_FOLDERS)(quantized, found)


def _server(name: str) -> Rule:
    def rule(quantized: Checkpoint, found: Verdicts) -> str | None:
        return not_served(quantized, name) or _reads(*_FOLDERS)(quantized, found)

    return rule


def not_served(quantized: Checkpoint, name: str) -> str | None:
    """Why a server such as vLLM cannot run a checkpoint, or None."""
    if EMBEDDING in quantized.schemes:
        return f"{EMBEDDING}: {name} takes no quantized embedding"
    for module, scheme in quantized.schemes.items():
        if reason := _kernel(scheme):
            return f"{module} ({scheme.label}): {name} {reason}"
    for layer in range(quantized.config.num_layers):
        if reason := _one_scheme(quantized, layer):
            return f"{reason}; {name} multiplies them as one matrix"
    return None


def check_served(folder: Path) -> None:
    """Raise UnsupportedError for a quantized folder that vLLM cannot load.

    The hint names the formats that hold its codes.
    """
    quantized = open_source(str(folder))
    reason = not_served(quantized, "vLLM")
    if reason is None:
        return
    exports = [name for name in ("gguf", "onnx") if EXPORTS[name](quantized).reason is None]
    if exports:
        hint = f"export the folder with qwen3-export {' or '.join(exports)}, and serve what that writes"
    else:
        hint = "quantize the original with another recipe: qwen3-export plan says which vLLM runs"
    raise UnsupportedError(f"{folder}: vLLM cannot load it: {reason}", hint)


def _kernel(scheme: QuantScheme) -> str | None:
    """Why a server's weight-only and 8-bit kernels cannot run a scheme; else None."""
    if scheme.ggml_type is not None:
        return f"does not read {scheme.ggml_type}"
    if scheme.type == "int" and scheme.num_bits not in (4, 8):
        return f"has no kernel for {scheme.num_bits}-bit integers"
    if scheme.type == "int" and scheme.strategy == "group" and scheme.group_size not in (32, 64, 128):
        return f"has kernels for groups of 32, 64 and 128, not {scheme.group_size}"
    return None


def _one_scheme(quantized: Checkpoint, layer: int) -> str | None:
    for stage in quantized.config.block(layer).stages:
        if stage.routed:
            continue
        names = [f"{block_name(layer)}.{name}" for name in stage.names]
        if len({quantized.schemes.get(name) for name in names}) > 1:
            return f"{names[0]} and {names[-1]} have different schemes"
    return None


_FOLDERS = ("compressed-tensors", "gptq", "awq", "fp8")
# The formats that each runtime reads.
READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("transformers", "vllm", "sglang"), _FOLDERS),
    "onnxruntime": ("onnx", "onnx-standard"),
    "onnxruntime-genai": ("onnx",),
    "llama.cpp": ("gguf",),
    "tensorrt-rtx": ("tensorrt",),
    "torch": (*_FOLDERS, "ggml"),
}
RUNTIMES: dict[str, Rule] = {
    "transformers": _transformers,
    "vllm": _server("vLLM"),
    "sglang": _server("SGLang"),
    **{
        name: _reads(*READ_BY[name])
        for name in ("onnxruntime", "onnxruntime-genai", "llama.cpp", "tensorrt-rtx", "torch")
    },
}
