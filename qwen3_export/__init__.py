"""qwen3-export: Qwen3 checkpoints to quantized, proven ONNX, GGUF and TensorRT artifacts.

    solve → ship → run → prove, over files on disk

`core` knows tensors and files, `model` the torch forward pass, `solve` quantizes, `ship` writes
formats, `run` asks runtimes for logits, `prove` compares them; `cli` is the only place that prints.
The functions of `api` are the command line's work without the command line.
"""

from __future__ import annotations

__version__ = "0.1.0"

from qwen3_export.api import bench, export, plan, quantize, validate
from qwen3_export.result import Result

__all__ = ["Result", "bench", "export", "plan", "quantize", "validate"]
