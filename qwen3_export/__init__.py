"""qwen3-export: Qwen3 checkpoints to quantized, proven ONNX, GGUF and TensorRT artifacts.

    solve → ship → run → prove, over files on disk

`core` knows tensors and files, `model` the torch forward pass, `solve` quantizes, `ship` writes
formats, `run` asks runtimes for logits, `prove` compares them; `cli` is the only place that prints.
The four functions below are the command line's work without the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["bench", "export", "quantize", "validate"]

_FORMATS = ("onnx", "gguf", "tensorrt")


def quantize(source: str | Path, recipe: str, output: str | Path, **settings: Any) -> dict[str, Any]:
    """Quantize `source` into the folder `output`; `settings` are those of `solve.job.QuantizeSettings`.

    Returns what `qwen3-export quantize --json` prints; raises `errors.ExportError`.
    """
    from qwen3_export.core.recipe import load_recipe
    from qwen3_export.core.source import open_source
    from qwen3_export.solve.job import QuantizeSettings
    from qwen3_export.solve.quantize import quantize as run

    return run(open_source(str(source)), load_recipe(recipe), Path(output), QuantizeSettings(**settings))


def export(source: str | Path, output: str | Path, format: str, **options: Any) -> dict[str, Any]:
    """Write `source` as `onnx`, `gguf` or `tensorrt`; `options` are those of each format's exporter.

    Returns what the command of that name prints with `--json`; raises `errors.ExportError`.
    """
    import importlib

    from qwen3_export.core.source import open_source
    from qwen3_export.errors import InputError

    if format not in _FORMATS:
        raise InputError(f"format {format!r}: one of {', '.join(_FORMATS)} was expected")
    module = importlib.import_module(f"qwen3_export.ship.{format}")
    if format == "onnx":
        from qwen3_export.prove.cache import cache_cost, cache_scales
        from qwen3_export.prove.rounding import level_cost

        options = {"measure": level_cost, "study_cache": (cache_scales, cache_cost), **options}
    result: dict[str, Any] = getattr(module, f"export_{format}")(open_source(str(source)), Path(output), **options)
    return result


def validate(artifacts: Sequence[str | Path], reference: str | Path, **limits: float) -> dict[str, Any]:
    """Measure artifacts against a reference file or the original; `limits` as in `prove.limits.LIMITS`.

    Returns `{results, passed}` as `qwen3-export validate --json` prints; raises `errors.ExportError`.
    """
    from qwen3_export.prove.validate import open_reference
    from qwen3_export.prove.validate import validate as run

    return run([Path(artifact) for artifact in artifacts], open_reference(str(reference)), limits)


def bench(artifacts: Sequence[str | Path], **workload: Any) -> dict[str, Any]:
    """Time artifacts on this device; `workload` is that of `prove.latency.Workload`.

    Returns `{results, passed}` as `qwen3-export bench --json` prints; raises `errors.ExportError`.
    """
    from qwen3_export.prove.latency import Workload
    from qwen3_export.prove.latency import bench as run

    return run([Path(artifact) for artifact in artifacts], Workload(**workload))
