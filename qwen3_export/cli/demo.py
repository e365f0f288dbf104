"""The command `demo`: the main job on the embedded model, end to end.

reference-model ─▶ RTN and GPTQ folders ─▶ ONNX, GGUF, TensorRT ─▶ drift and latency ─▶ one table
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import Force, Json, Quiet, Verbose, app, console
from qwen3_export.cli.console import Console, nats, size, table, tell, verdict
from qwen3_export.cli.demo_rival import BUILDER, build, builder_is_there
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import write_manifest
from qwen3_export.core.model_card import update_card
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.process import sleeping_threads, uninterrupted
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.source import REFERENCE_MODEL, open_source
from qwen3_export.errors import MissingRuntimeError

# Largest KL of a sound artifact of the embedded model, nats per token.
LIMITS = {"16 bit": 1e-3, "8 bit": 2e-3, "4 bit": 0.05, "another tool's": 0.5}
_SAMPLES, _LENGTH, _HELD_OUT = 32, 256, 4_000
# Bits per weight: of the decoder's linears (None where unknown), and of the whole model.
Bits = tuple[float | None, float]


@dataclass(frozen=True)
class Product:
    """One artifact of the demo: file name, needed modules, kind of limit, maker."""

    name: str
    needs: tuple[str, ...]
    limit: str
    make: Callable[[Path], Bits]


class _Calm(Console):
    """A console that leaves warnings about the machine to the report.

    The demo shows what can be done; its timings are no measurement.
    """

    def warn(self, text: str) -> None:
        """See `Console.warn`."""
        self.log(f"warning: {text}")


@app.command(epilog="Example: qwen3-export demo --output demo-output")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for artifacts and the report.")] = Path(
        "demo-output"
    ),
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Do the main job on the embedded model: a first look.

    It is quantized and written in every format that this machine can write; each artifact is validated and timed in its
    own runtime. One table at the end.
    """
    show, started = console(json, quiet, verbose), time.monotonic()
    _need_torch()
    with staged_folder(output, force) as folder:
        made, skipped = _make(folder, show)
        result = _prove(folder, made, show)
        result = _relocate(result, folder, output)
        result |= {"output": str(output), "seconds": time.monotonic() - started, "skipped": skipped}
        from qwen3_export.prove.report import write_report

        write_report(folder / "report", result, title="Demo on the embedded reference model")
        write_manifest(folder, "demo", {"artifacts": list(made)})
    show.result(result, lambda: _print(result))
    if not result["passed"]:
        raise typer.Exit(1)


def _need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise MissingRuntimeError("the demo quantizes, and needs torch", "pip install 'qwen3-export[solve]'")
    with uninterrupted(), sleeping_threads():
        importlib.import_module("torch")


def _make(folder: Path, show: Console) -> tuple[dict[str, tuple[Bits, str]], dict[str, str]]:
    """Quantize and export every artifact that this machine can write.

    Returns `{file name: (bits per weight, kind of limit)}`, and why the others were left out.
    """
    quantized = {
        name: _quantize(folder, name, show) for name in ("rtn-w4a16-g128", "gptq-w4a16-g128", "edge-w4", "gguf-q4_k_m")
    }
    made: dict[str, tuple[Bits, str]] = {name: (bits, "4 bit") for name, bits in quantized.items()}
    skipped = {}
    for product in _products(folder, show):
        missing = [module for module in product.needs if importlib.util.find_spec(module) is None]
        if missing:
            skipped[product.name] = f"{', '.join(missing)} is not installed"
            show.say(f"skipped {product.name}: {skipped[product.name]}")
        else:
            made[product.name] = (product.make(folder / product.name), product.limit)
    return made, skipped


def _bits(result: dict[str, Any]) -> Bits:
    return result.get("linear_bits_per_weight"), result["bits_per_weight"]


def _quantize(folder: Path, recipe: str, show: Console) -> Bits:
    from qwen3_export.solve.job import QuantizeSettings
    from qwen3_export.solve.methods import load_method
    from qwen3_export.solve.quantize import needs_inputs, quantize

    loaded, settings = load_recipe(recipe), QuantizeSettings()
    if needs_inputs(loaded, *load_method(loaded)):
        settings = QuantizeSettings(samples=_SAMPLES, sequence_length=_LENGTH)
    return _bits(quantize(open_source(REFERENCE_MODEL), loaded, folder / recipe, settings, show))


def _products(folder: Path, show: Console) -> list[Product]:
    def onnx(source: str, level: int | None = None) -> Callable[[Path], Bits]:
        def make(output: Path) -> Bits:
            from qwen3_export.prove.rounding import level_cost
            from qwen3_export.ship.onnx import export_onnx

            options: dict[str, Any] = {"accuracy_level": level, "progress": show, "measure": level_cost}
            return _bits(export_onnx(_open(folder, source), output, **options))

        return make

    def gguf(source: str, kind: str | None = None) -> Callable[[Path], Bits]:
        def make(output: Path) -> Bits:
            from qwen3_export.ship.gguf import export_gguf

            return _bits(export_gguf(_open(folder, source), output, kind, progress=show))

        return make

    def plan(output: Path) -> Bits:
        from qwen3_export.ship.tensorrt import export_tensorrt

        return _bits(export_tensorrt(_open(folder, "gptq-w4a16-g128"), output, progress=show))

    to_onnx, to_gguf = ("onnx_ir", "onnxruntime"), ("gguf", "xllamacpp")
    return [
        Product("onnx-fp32", to_onnx, "16 bit", onnx(REFERENCE_MODEL)),
        Product("onnx-gptq-g128", to_onnx, "4 bit", onnx("gptq-w4a16-g128", level=0)),
        Product("onnx-edge-w4", to_onnx, "4 bit", onnx("edge-w4")),
        *([Product(BUILDER, to_onnx, "another tool's", build)] if builder_is_there() else []),
        Product("bf16.gguf", to_gguf, "16 bit", gguf(REFERENCE_MODEL, "bf16")),
        Product("q8_0.gguf", to_gguf, "8 bit", gguf(REFERENCE_MODEL, "q8_0")),
        Product("rounded-q4_k_m.gguf", to_gguf, "4 bit", gguf(REFERENCE_MODEL, "q4_k_m")),
        Product("solved-q4_k_m.gguf", to_gguf, "4 bit", gguf("gguf-q4_k_m")),
        Product("tensorrt-gptq-g128", ("onnx_ir", "onnxruntime", "tensorrt_rtx"), "4 bit", plan),
    ]


def _open(folder: Path, source: str) -> Any:
    return open_source(source) if source == REFERENCE_MODEL else open_checkpoint(folder / source)


def _prove(folder: Path, made: dict[str, tuple[Bits, str]], show: Console) -> dict[str, Any]:
    """Validate and time every artifact; one result for each."""
    from qwen3_export.prove.failed import first_error
    from qwen3_export.prove.latency import Workload, bench
    from qwen3_export.prove.validate import open_reference, validate

    reference = open_reference(REFERENCE_MODEL, tokens=_HELD_OUT, progress=show)
    results = []
    for name, ((linears, bits), kind) in made.items():
        drift = validate([folder / name], reference, {"max_kl": LIMITS[kind]}, progress=show)["results"][0]
        update_card(folder / name, drift)
        results.append({**drift, "bits_per_weight": bits, "linear_bits_per_weight": linears})
    workload, calm = Workload((128, 512), new_tokens=32, repeat=3), _Calm(show.json, show.quiet, show.verbose)
    timed = bench([folder / name for name in made], workload, calm)
    if error := first_error(timed):
        raise error
    results = [{**drift, **speed} for drift, speed in zip(results, timed["results"], strict=True)]
    return {"results": results, "passed": all(item["gate"]["passed"] for item in results)}


def _relocate(result: dict[str, Any], partial: Path, output: Path) -> dict[str, Any]:
    """Replace the unfinished folder's name by the final one in a result's paths."""
    for item in result["results"]:
        item["artifact"] = str(output / Path(item["artifact"]).relative_to(partial))
    return result


def _print(result: dict[str, Any]) -> None:
    headers = ["artifact", "runtime", "bits/weight", "of linears", "size", "KL (nats)", "top-1", "ppl ratio"]
    rows = [
        [
            Path(item["artifact"]).name,
            item["runtime"],
            f"{item['bits_per_weight']:.2f}",
            "-" if item["linear_bits_per_weight"] is None else f"{item['linear_bits_per_weight']:.2f}",
            size(item["bytes"]),
            nats(item),
            f"{100 * item['top1_agreement']:.1f} %",
            f"{item['ppl_ratio']:.4f}",
            f"{item['prefill'][-1]['tokens_per_second']:.0f}",
            f"{item['decode']['tokens_per_second_p50']:.0f}",
            verdict(item),
        ]
        for item in result["results"]
    ]
    table([*headers, "prefill tok/s", "decode tok/s", "verdict"], rows)
    for name, reason in result["skipped"].items():
        tell(f"skipped {name}: {reason}")
    tell(f"{result['seconds']:.0f} s; artifacts in {result['output']}, report: {result['output']}/report/report.html")
