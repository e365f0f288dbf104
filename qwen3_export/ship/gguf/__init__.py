"""GGUF files for llama.cpp.

16-bit weights are written as llama.cpp's converter writes them, or rounded; codes are moved bit for bit.

    types      the type of every matrix: by llama.cpp's mixes, or the one that holds the codes
    options    options of an export, and which of them would change nothing
    plan       the tensors of the file in their order
    encode     a matrix as data of a type, in pieces of rows
    losses     a first look at the numbers, for tensors that their type would lose
    write      header, metadata and data of a file or of a shard
    shards     names of the shards, and how all of them appear together
    metadata   the model's numbers, its tokenizer and its chat template

The experts of a layer form one tensor, whose data are written expert after expert. The embedding is `token_embd`, an
untied head `output`. Without `output` llama.cpp uses `token_embd` for both, so a tied matrix is stored once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray

from qwen3_export import __version__
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.coverage import GGUF_KEY
from qwen3_export.core.disk import naming_full
from qwen3_export.core.gguf_fallbacks import Fallbacks, fallbacks_of
from qwen3_export.core.gguf_types import CONVERTERS_TYPES, FILE_TYPES, PLAIN
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.progress import Progress
from qwen3_export.core.text_files import template_warning
from qwen3_export.ggml import import_loops
from qwen3_export.ship.gguf.encode import Encoder, in_order
from qwen3_export.ship.gguf.losses import refuse_lost
from qwen3_export.ship.gguf.metadata import ARCHITECTURES, add_metadata, check_architecture
from qwen3_export.ship.gguf.options import (
    Options,
    another_model,
    check_importance,
    check_overrides,
    check_split_size,
    larger_than_shards,
    unweighed,
    without_experts,
)
from qwen3_export.ship.gguf.plan import check_stacks, planned_tensors
from qwen3_export.ship.gguf.shards import check_places, shard_paths, staged_files
from qwen3_export.ship.gguf.types import Types, choose_types, is_asked, supports
from qwen3_export.ship.gguf.write import Planned, split, write_header, write_shard
from qwen3_export.ship.result import export_result, provenance

__all__ = ["Options", "check_request", "export_gguf", "planned_bytes", "supports"]


def export_gguf(
    checkpoint: Checkpoint, output: Path, type_name: str | None = None, force: bool = False,
    progress: Progress | None = None, options: Options | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a GGUF file; returns the result that `--json` prints.

    `type_name` is one of `core.gguf_types.FILE_TYPES`; None takes the types that hold the source's codes, or bf16 for
    a 16-bit source. Raises UnsupportedError, before anything is written, when the codes do not fit, or when a type
    would lose its tensor.
    """
    started, progress, options = time.monotonic(), progress or Progress(), options or Options()
    encoder, plan = _checked(checkpoint, type_name, options)
    types = encoder.types
    if _rounds(checkpoint, types):
        import_loops()
    others = _fallbacks(checkpoint, types, options)
    warnings = (
        unweighed(plan, encoder, options), another_model(checkpoint, options), larger_than_shards(plan, options),
        without_experts(types, checkpoint.config.num_experts), others.warning(),
        template_warning(checkpoint.folder, checkpoint.name),
    )  # fmt: skip
    for warning in warnings:
        if warning is not None:
            progress.warn(warning)
    paths = _write(checkpoint, output, plan, encoder, force, progress, options)
    files = [{"path": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths]
    linears = checkpoint.config.all_linears()
    linear_bytes = sum(item.nbytes for item in plan if item.modules[0] in linears)
    tensor_bytes = sum(item.nbytes for item in plan)
    result = export_result(paths[0], files, checkpoint, encoder.inexact(), started, linear_bytes, tensor_bytes)
    result |= {"type": types.file_type, **others.result()}
    if types.requantized:
        result["requantized"] = _requantized(types, encoder)
    return result


def _checked(checkpoint: Checkpoint, type_name: str | None, options: Options) -> tuple[Encoder, list[Planned]]:
    """The encoder and the tensors of the file; raises what `check_request` does."""
    check_split_size(options)
    check_architecture(checkpoint.config)
    given = options.importance
    types = choose_types(checkpoint, type_name, options.overrides, given is not None, options.allow_requantize)
    check_stacks(checkpoint.config, types)
    plan = list(planned_tensors(checkpoint, types))
    check_overrides(plan, types, options.overrides)
    importance = {} if given is None else given.for_model(checkpoint.config)
    encoder = Encoder(checkpoint, types, importance, options.threads)
    if given is not None:
        check_importance(plan, encoder, given)
    return encoder, plan


def check_request(
    checkpoint: Checkpoint, type_name: str | None = None, options: Options | None = None, output: Path | None = None,
    force: bool = False,
) -> int:  # fmt: skip
    """Check everything that can be known before the long work.

    Gives the bytes of all tensors. An export with a recipe is checked with it before the recipe runs. Raises InputError
    for an unknown type and for an option that would change nothing, UnsupportedError for the first tensor that does not
    fit. With an `output`, InputError where one of its files may not be replaced.
    """
    options = options or Options()
    _, plan = _checked(checkpoint, type_name, options)
    if output is not None:
        check_places(output, len(split(plan, options.split_max_bytes)), force, _inputs(checkpoint, options))
    return sum(item.nbytes for item in plan)


def planned_bytes(checkpoint: Checkpoint, type_name: str | None = None) -> int:
    """Size in bytes of the file that an export would write, from shapes alone."""
    encoder, plan = _checked(checkpoint, type_name, Options())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"

        def describe(writer: gguf.GGUFWriter) -> None:
            add_metadata(writer, checkpoint, FILE_TYPES[encoder.types.file_type].number)

        with naming_full(path):
            write_header(path, ARCHITECTURES[checkpoint.config.model_type], plan, describe)
        return path.stat().st_size + sum(item.nbytes for item in plan)


def _rounds(checkpoint: Checkpoint, types: Types) -> bool:
    """Whether the export rounds any matrix."""
    plain = (module for module in types.modules if module not in checkpoint.schemes)
    return any(types.modules[module] not in PLAIN for module in (*plain, *types.requantized))


def _fallbacks(checkpoint: Checkpoint, types: Types, options: Options) -> Fallbacks:
    """The tensors whose rows the blocks of the wanted type do not divide."""
    config = checkpoint.config

    def asked(module: str) -> bool:
        return is_asked(module, options.overrides, config.tie_word_embeddings)

    return fallbacks_of(config.all_matrices(), types.modules, types.fallbacks, asked)


def _requantized(types: Types, encoder: Encoder) -> list[dict[str, Any]]:
    """The tensors whose codes were rounded again, with types and errors."""
    errors = {item["name"]: item["max_rel_error"] for item in encoder.inexact()}
    return [
        {
            "name": module,
            "from": item.scheme.label,
            "to": item.type,
            "max_rel_error": errors.get(f"{module}.weight", 0.0),
        }
        for module, item in types.requantized.items()
    ]


def _write(
    checkpoint: Checkpoint, output: Path, plan: list[Planned], encoder: Encoder, force: bool, progress: Progress,
    options: Options,
) -> list[Path]:  # fmt: skip
    """Write the file or its shards, and return where they are."""
    shards = split(plan, options.split_max_bytes)
    architecture = ARCHITECTURES[checkpoint.config.model_type]
    label = f"export tensors of {output.name}"

    def pieces(item: Planned) -> Iterator[NDArray]:
        tasks = (task for module in item.modules for task in encoder.tasks(module, item.type))
        for encoded in in_order(tasks, encoder.threads):
            encoder.note(encoded.changes)
            yield encoded.data
        encoder.refuse_lost(item.modules)

    inputs = _inputs(checkpoint, options)
    with staged_files(output, len(shards), force, inputs) as partials, progress.bar(label, 2 * len(plan)) as tick:
        refuse_lost(encoder, plan, tick)
        for number, (partial, shard) in enumerate(zip(partials, shards, strict=True)):

            def describe(writer: gguf.GGUFWriter, number: int = number) -> None:
                if number == 0:
                    _describe(writer, checkpoint, encoder.types, options, len(shards))
                if len(shards) > 1:
                    writer.add_uint16("split.no", number)
                    writer.add_uint16("split.count", len(shards))
                    writer.add_int32("split.tensors.count", len(plan))

            write_shard(partial, architecture, shard, describe, pieces, tick)
    return shard_paths(output, len(shards))


def _inputs(checkpoint: Checkpoint, options: Options) -> list[Path | None]:
    """What the export reads, which no file of its output may replace."""
    return [checkpoint.folder, None if options.importance is None else options.importance.path]


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint, types: Types, options: Options, shards: int) -> None:
    """Add all metadata: the converter's keys and our own.

    These are our version, the origin of the codes, and the importance matrix. A file that llama.cpp's converter writes
    too is the same as its own, byte for byte, and does not name us.
    """
    add_metadata(writer, checkpoint, FILE_TYPES[types.file_type].number)
    if options.importance is not None:
        writer.add_string("quantize.imatrix.file", options.importance.name)
        writer.add_string("quantize.imatrix.dataset", ", ".join(options.importance.datasets))
        writer.add_uint32("quantize.imatrix.entries_count", len(options.importance.entries))
        writer.add_uint32("quantize.imatrix.chunks_count", options.importance.chunks)
    if checkpoint.schemes or shards > 1 or not set(types.modules.values()) <= set(CONVERTERS_TYPES):
        writer.add_string("qwen3_export.version", __version__)
    if checkpoint.schemes:
        origin = provenance(checkpoint)
        writer.add_string("qwen3_export.source.sha256", origin["source"]["sha256"])
        writer.add_string("qwen3_export.recipe", origin["quantized"]["recipe"])
        if origin["experts"] is not None:
            writer.add_string(GGUF_KEY, json.dumps(origin["experts"]))
