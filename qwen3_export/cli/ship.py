"""The commands `onnx`, `gguf` and `tensorrt`, which write those formats.

With --recipe they quantize a 16-bit source first.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3_export.cli.app import Force, Json, OutputFile, Quiet, Source, Verbose, app, console
from qwen3_export.cli.exported import exported
from qwen3_export.cli.on_the_way import (
    Calibration,
    Device,
    Memory,
    Quantizing,
    RecipeOption,
    Resume,
    RoundingThreads,
    Samples,
    ScratchOption,
    Seed,
    SequenceLength,
    StudyThreads,
    Threads,
    prepared,
)
from qwen3_export.cli.solve import parse_bytes
from qwen3_export.core.process import uncollected, uninterrupted
from qwen3_export.core.units import parse_size
from qwen3_export.errors import InputError, MissingRuntimeError

if TYPE_CHECKING:
    from qwen3_export.core.checkpoint import Checkpoint


@app.command(
    epilog="Example: qwen3-export onnx quantized --output model-onnx",
)
def onnx(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    target: Annotated[
        str, typer.Option(help="cpu; cuda: fp16; web: transformers.js; standard: ai.onnx operators only.")
    ] = "cpu",
    flavor: Annotated[
        str | None, typer.Option(help="`ort`: ONNX Runtime's fused operators; `standard`: ai.onnx only.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Activations: fp32, fp16 or bf16 (default: the target's).")] = (
        None
    ),
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            min=0, max=4, help="MatMulNBits: 0 exact activations, 4 int8 ones, the fast way (default: the target's)."
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4: calibrated codes, a quarter or an eighth of fp32's memory (default: as --precision)."
        ),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="Of `standard`: 21 for older runtimes, 23 or 24 (default: 23).")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Data beyond this size goes to a next file, e.g. 2GB.")
    ] = None,
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    memory: Memory = None,
    device: Device = None,
    threads: StudyThreads = None,
    resume: Resume = None,
    scratch: ScratchOption = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write an ONNX folder for onnxruntime and onnxruntime-genai.

    Codes land unchanged.
    """
    _need("onnx_ir", "onnx")
    show, shard_bytes = console(json, quiet, verbose), _shard_bytes(max_shard_size)
    options = Quantizing(
        calibration, samples, sequence_length, seed, memory, device, threads if recipe else None, resume, scratch
    )
    choice: dict[str, Any] = {
        "flavor": flavor, "precision": precision, "accuracy_level": accuracy_level, "target": target,
        "kv_cache": kv_cache, "opset": opset,
    }  # fmt: skip

    rounds = accuracy_level == 4 or (accuracy_level is None and target in ("cpu", "web") and flavor != "standard")
    # Of the plan's two kinds of ONNX the second is not measured.
    measured = "onnx" if rounds or kv_cache in ("int8", "int4") else "onnx-standard"

    def check(checkpoint: Checkpoint) -> int:
        # Imported here, while the source is hashed.
        _import("qwen3_export.ship.onnx.library")
        from qwen3_export.ship.onnx import check_request
        from qwen3_export.ship.onnx.size import planned_bytes

        return planned_bytes(checkpoint, check_request(checkpoint, **choice).precision)

    with prepared(source, recipe, options, output, force, show, check, measured) as checkpoint:
        from qwen3_export.prove.cache import cache_cost, cache_scales
        from qwen3_export.prove.rounding import level_cost
        from qwen3_export.ship.onnx import export_onnx

        result = export_onnx(
            checkpoint, output, **choice, force=force, progress=show,
            max_shard_size=shard_bytes, measure=partial(level_cost, threads=threads),
            study_cache=(partial(cache_scales, threads=threads), partial(cache_cost, threads=threads)),
        )  # fmt: skip
    show.result(result, lambda: exported(result))


@app.command(epilog="Example: qwen3-export gguf quantized --output model.gguf")
def gguf(
    source: Source,
    output: OutputFile,
    type_name: Annotated[
        str | None,
        typer.Option("--type", help="bf16, f16, q8_0, q4_k_m … (default: what holds the codes, else bf16)."),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=TYPE", help="Type of the tensors in whose name a pattern is found, repeatable."),
    ] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="Type of token_embd.")] = None,
    output_type: Annotated[str | None, typer.Option(help="Type of the output head, tied or not.")] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix that weighs the errors of rounding.")] = None,
    split_max_size: Annotated[
        str | None,
        typer.Option(help="Write shards of tensors of at most this size, e.g. 4G (NAME-00001-of-0000N.gguf)."),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Round codes again that no type holds, or another was asked for.")
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write a model card, README.md, beside the file, or add to the one there.")
    ] = False,
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    memory: Memory = None,
    device: Device = None,
    threads: RoundingThreads = None,
    resume: Resume = None,
    scratch: ScratchOption = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a GGUF file for llama.cpp.

    16-bit weights are rounded to any of its types, codes moved bit for bit.
    """
    _need("gguf", "gguf")
    _import("gguf")
    from qwen3_export.core.gguf_types import Overrides
    from qwen3_export.core.imatrix import read_imatrix
    from qwen3_export.core.model_card import check_gguf_card, write_gguf_card
    from qwen3_export.ship.gguf import Options, check_request, export_gguf
    from qwen3_export.ship.result import provenance

    chosen = Options(
        Overrides(tuple(map(_pattern, tensor_type or ())), _lower(token_embedding_type), _lower(output_type)),
        None if imatrix is None else read_imatrix(imatrix),
        None if split_max_size is None else _split_size(split_max_size),
        allow_requantize,
        threads,
    )
    show = console(json, quiet, verbose)
    options = Quantizing(
        calibration, samples, sequence_length, seed, memory, device, threads if recipe else None, resume, scratch
    )
    check = partial(check_request, type_name=type_name, options=chosen, output=output, force=force)
    if card:
        check_gguf_card(output)
    with prepared(source, recipe, options, output, force, show, check, "gguf", False, imatrix) as checkpoint:
        result = export_gguf(checkpoint, output, type_name, force, show, chosen)
        if card:
            origin = {**provenance(checkpoint), "imatrix": imatrix and imatrix.name}
            show.note(f"model card written: {write_gguf_card(Path(result['output']), {**origin, **result})}")
    show.result(result, lambda: exported(result))


def _pattern(text: str) -> tuple[str, str]:
    """Split `PATTERN=TYPE` at the last `=`."""
    pattern, found, name = text.rpartition("=")
    if not found or not pattern:
        raise InputError(f"--tensor-type {text}: PATTERN=TYPE was expected", "e.g. --tensor-type attn_v=q8_0")
    return pattern, name.lower()


def _lower(name: str | None) -> str | None:
    return name and name.lower()


def _split_size(text: str) -> int:
    count = parse_size(text)
    if not count:
        raise InputError(f"--split-max-size {text}: a size such as 4G was expected")
    return count


@app.command(epilog="Example: qwen3-export tensorrt quantized --output model-trt --sm 8.9 --sm 12.0")
def tensorrt(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    engine: Annotated[str, typer.Option(help="`rtx`: TensorRT-RTX, needs no GPU; `trt`: TensorRT, on its device.")] = (
        "rtx"
    ),
    sm: Annotated[
        list[str] | None, typer.Option(help="Compute capability of `rtx`, repeatable (default 8.6, 8.9, 12.0).")
    ] = None,
    precision: Annotated[str, typer.Option(help="Activations and unquantized weights: fp16 or bf16.")] = "fp16",
    max_prompt: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="Longest prompt at once (default 1024).")
    ] = None,
    max_context: Annotated[int | None, typer.Option(min=1, max=1 << 20, help="Longest cache (default 4096).")] = None,
    onnx_only: Annotated[
        bool, typer.Option("--onnx-only", help="No plan: print the command that builds it on its device.")
    ] = False,
    recipe: RecipeOption = None,
    calibration: Calibration = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    memory: Memory = None,
    device: Device = None,
    threads: Threads = None,
    resume: Resume = None,
    scratch: ScratchOption = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write an ONNX for TensorRT and build its plan ahead of time."""
    _need("onnx_ir", "tensorrt")
    _import("qwen3_export.ship.onnx.library")
    from qwen3_export.ship.onnx.size import planned_bytes as onnx_bytes
    from qwen3_export.ship.tensorrt import check_request, export_tensorrt, planned_bytes
    from qwen3_export.ship.tensorrt.profiles import default_profile

    show, capabilities = console(json, quiet, verbose), tuple(sm) if sm else None
    limit = parse_bytes(memory) if memory else None
    if threads is not None and recipe is None:
        raise InputError("--threads: building a plan takes one thread, and there is no --recipe", "leave it away")
    options = Quantizing(calibration, samples, sequence_length, seed, memory, device, threads, resume, scratch)

    def check(checkpoint: Checkpoint) -> int:
        profile = default_profile(checkpoint.config, max_prompt, max_context)
        check_request(checkpoint, engine, capabilities, precision, profile, onnx_only, limit)
        return (onnx_bytes if onnx_only else planned_bytes)(checkpoint, precision)

    with prepared(source, recipe, options, output, force, show, check, "tensorrt") as checkpoint:
        profile = default_profile(checkpoint.config, max_prompt, max_context)
        result = export_tensorrt(
            checkpoint, output, engine, capabilities, precision, profile, force, show, onnx_only
        )  # fmt: skip
    show.result(result, lambda: exported(result))


def _need(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise MissingRuntimeError(f"this export needs {module}", f"pip install 'qwen3-export[{extra}]'")


def _import(module: str) -> None:
    import importlib

    with uninterrupted(), uncollected():
        importlib.import_module(module)


def _shard_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    found = parse_size(text)
    if not found:
        raise InputError(f"--max-shard-size {text}: a size such as 2GB was expected")
    return found
