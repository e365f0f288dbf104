"""A peer for the demo's table: the int4 model of onnxruntime-genai's builder."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from qwen3_export.core.memory import check_child
from qwen3_export.core.source import REFERENCE_MODEL, open_source
from qwen3_export.errors import MissingRuntimeError

BUILDER = "builder-int4"
_MODULE = "onnxruntime_genai.models.builder"


def builder_is_there() -> bool:
    """Whether onnxruntime-genai's builder and its requirements are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnxruntime_genai", "transformers", "torch"))


def build(output: Path) -> tuple[None, float]:
    """Write the builder's folder with its defaults for a CPU.

    Returns bits per weight: None for the linears, where it is unknown, and that of the whole model.
    """
    checkpoint = open_source(REFERENCE_MODEL)
    cache = output.with_name(f".{output.name}.cache")
    command = [sys.executable, "-m", _MODULE, "-i", str(checkpoint.folder), "-o", str(output), "-c", str(cache)]
    child = subprocess.run([*command, "-p", "int4", "-e", "cpu"], capture_output=True, text=True, check=False)
    if child.returncode:
        check_child("onnxruntime-genai's builder", child)
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingRuntimeError(
            f"onnxruntime-genai's builder ended with status {child.returncode} ({last})",
            "uninstall onnxruntime-genai, or mend it: the demo compares with it where it is installed",
        )
    data = sum(path.stat().st_size for path in output.glob("*.onnx.data"))
    return None, 8 * data / checkpoint.config.num_parameters
