"""GGUF files for llama.cpp.

16-bit weights are written as llama.cpp's converter writes them, or rounded; codes are moved bit for bit.

    types      the type of every matrix: by llama.cpp's mixes, or the one that holds the codes
    encode     a matrix as data of a type, in pieces of rows
    losses     a first look at the numbers, for tensors that their type would lose
    write      header, metadata and data of a file or its shards
    metadata   the model's numbers, its tokenizer and its chat template

The experts of a layer form one tensor, whose data are written expert after expert. The embedding is `token_embd`, an
untied head `output`. Without `output` llama.cpp uses `token_embd` for both, so a tied matrix is stored once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray

from qwen3_export import __version__
from qwen3_export.core.architecture import ROUTER, is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.coverage import GGUF_KEY
from qwen3_export.core.gguf_types import FILE_TYPES, PLAIN, Overrides, block_length, gguf_name
from qwen3_export.core.imatrix import Imatrix
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config, block_name
from qwen3_export.errors import UnsupportedError
from qwen3_export.ggml import import_loops
from qwen3_export.ship.gguf.encode import Encoder, in_order
from qwen3_export.ship.gguf.losses import refuse_lost
from qwen3_export.ship.gguf.metadata import ARCHITECTURES, add_metadata, check_architecture
from qwen3_export.ship.gguf.types import Types, choose_types, supports
from qwen3_export.ship.gguf.write import Planned, shard_paths, split, staged_files, write_header, write_shard
from qwen3_export.ship.result import export_result, provenance

__all__ = ["Options", "check_request", "export_gguf", "planned_bytes", "supports"]
_OTHERS = {
    "input_layernorm": "attn_norm",
    ROUTER: "ffn_gate_inp",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_norm": "attn_q_norm",
}


@dataclass(frozen=True)
class Options:
    """Options of an export beside the type.

    `importance` weighs the errors of rounding. `split_max_bytes` divides the file into shards. `allow_requantize`
    permits to round codes again, if no type holds them or another type is asked for.
    """

    overrides: Overrides = field(default_factory=Overrides)
    importance: Imatrix | None = None
    split_max_bytes: int | None = None
    allow_requantize: bool = False


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
    types, plan = _checked(checkpoint, type_name, options)
    given = options.importance
    importance = {} if given is None else given.for_model(checkpoint.config)
    if _rounds(checkpoint, types):
        import_loops()
    if given is not None:
        _tell_unweighed(plan, types, importance, progress)
    encoder = Encoder(checkpoint, types, importance)
    paths = _write(checkpoint, output, plan, encoder, force, progress, options)
    files = [{"path": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths]
    linears = checkpoint.config.all_linears()
    linear_bytes = sum(item.nbytes for item in plan if item.modules[0] in linears)
    result = export_result(paths[0], files, checkpoint, encoder.inexact(), started, linear_bytes)
    result["type"] = types.file_type
    if types.requantized:
        result["requantized"] = _requantized(types, encoder)
    return result


def _checked(checkpoint: Checkpoint, type_name: str | None, options: Options) -> tuple[Types, list[Planned]]:
    """Types and tensors of the file; raises the errors of `check_request`."""
    check_architecture(checkpoint.config)
    weighed = options.importance is not None
    types = choose_types(checkpoint, type_name, options.overrides, weighed, options.allow_requantize)
    _check_stacks(checkpoint.config, types)
    return types, list(_plan(checkpoint, types))


def check_request(checkpoint: Checkpoint, type_name: str | None = None, options: Options | None = None) -> None:
    """Check everything that can be known before the long work.

    An export with a recipe is checked with it before the recipe runs. Raises InputError for an unknown type,
    UnsupportedError for the first tensor that does not fit.
    """
    options = options or Options()
    _checked(checkpoint, type_name, options)
    if options.importance is not None:
        options.importance.for_model(checkpoint.config)


def planned_bytes(checkpoint: Checkpoint, type_name: str | None = None) -> int:
    """Size in bytes of the file that an export would write, from shapes alone."""
    types, plan = _checked(checkpoint, type_name, Options())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"

        def describe(writer: gguf.GGUFWriter) -> None:
            add_metadata(writer, checkpoint, FILE_TYPES[types.file_type].number)

        write_header(path, ARCHITECTURES[checkpoint.config.model_type], plan, describe)
        return path.stat().st_size + sum(item.nbytes for item in plan)


def _rounds(checkpoint: Checkpoint, types: Types) -> bool:
    """Whether the export rounds any matrix."""
    plain = (module for module in types.modules if module not in checkpoint.schemes)
    return any(types.modules[module] not in PLAIN for module in (*plain, *types.requantized))


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


def _tell_unweighed(plan: list[Planned], types: Types, importance: Mapping[str, NDArray], progress: Progress) -> None:
    """Warn of rounded matrices that the importance matrix lacks.

    An embedding is never in it, so there is no warning for it.
    """
    missing = [
        item.name
        for item in plan
        if item.modules[0] in types.modules and item.type not in PLAIN and item.name not in importance
    ]
    missing = [name for name in missing if name not in ("token_embd.weight", "output.weight")]
    if missing:
        progress.warn(
            f"{len(missing)} tensors are not in the importance matrix and are rounded without: {missing[0]} …"
        )


def _plan(checkpoint: Checkpoint, types: Types) -> Iterator[Planned]:
    """Every tensor of the file in its order: head, embedding, blocks, final norm."""
    config = checkpoint.config
    for module in (EMBEDDING,) if config.tie_word_embeddings else (HEAD, EMBEDDING):
        yield _matrix(config, types, module)
    for layer in range(config.num_layers):
        others, prefix = config.other_shapes(layer), block_name(layer)
        names = [*others, *config.linear_shapes(layer)]
        for local in sorted(name for name in names if not is_expert(name)):
            if local in others:
                yield _float(checkpoint, f"{prefix}.{local}", f"blk.{layer}.{_OTHERS[local]}")
            else:
                yield _matrix(config, types, f"{prefix}.{local}")
            if local == "input_layernorm" and config.is_sparse(layer):
                yield from _experts(config, types, layer)
    yield _float(checkpoint, "model.norm", "output_norm")


def _float(checkpoint: Checkpoint, module: str, name: str) -> Planned:
    """A norm or a router, always in fp32."""
    return Planned(f"{name}.weight", checkpoint.entry(f"{module}.weight").shape, "f32", (module,))


def _matrix(config: Qwen3Config, types: Types, module: str) -> Planned:
    return Planned(f"{gguf_name(module)}.weight", config.all_matrices()[module], types.modules[module], (module,))


def _stacks(config: Qwen3Config, layer: int) -> list[tuple[tuple[int, int], tuple[str, ...]]]:
    """Shape and modules of a layer's linears that all experts have: down, gate, up."""
    routed = [(linear, stage) for stage in config.block(layer).stages if stage.routed for linear in stage.linears]
    return [
        (
            (linear.out_features, linear.in_features),
            tuple(f"{block_name(layer)}.{prefix}.{linear.name}" for prefix in stage.prefixes),
        )
        for linear, stage in sorted(routed, key=lambda item: item[0].name)
    ]


def _experts(config: Qwen3Config, types: Types, layer: int) -> Iterator[Planned]:
    """A layer's experts, stacked along a new first axis: down, gate, up."""
    for shape, modules in _stacks(config, layer):
        stacked = (config.num_experts, *shape)
        yield Planned(f"{gguf_name(modules[0])}.weight", stacked, types.modules[modules[0]], modules)


def _check_stacks(config: Qwen3Config, types: Types) -> None:
    """Raise UnsupportedError where a matrix cannot have its type.

    All experts of a stack must have one type, and the type's blocks must divide the rows.
    """
    for layer in config.sparse_layers:
        for _, modules in _stacks(config, layer):
            found = sorted({types.modules[module] for module in modules})
            if len(found) > 1:
                raise UnsupportedError(
                    f"{modules[0]}: llama.cpp stacks experts, so all of a layer need one scheme, not {', '.join(found)}"
                )
    shapes = config.all_matrices()
    for module, name in types.modules.items():
        if shapes[module][1] % block_length(name):
            raise UnsupportedError(
                f"{module}: its {shapes[module][1]} inputs are not divisible by {block_length(name)}"
            )


def _write(
    checkpoint: Checkpoint, output: Path, plan: list[Planned], encoder: Encoder, force: bool, progress: Progress,
    options: Options,
) -> list[Path]:  # fmt: skip
    """Write the file or its shards, and return where they are."""
    shards = split(plan, options.split_max_bytes)
    inputs = [checkpoint.folder, None if options.importance is None else options.importance.path]
    paths = shard_paths(output, len(shards))
    architecture = ARCHITECTURES[checkpoint.config.model_type]
    label = f"export tensors of {output.name}"

    def pieces(item: Planned) -> Iterator[NDArray]:
        tasks = (task for module in item.modules for task in encoder.tasks(module, item.type))
        for encoded in in_order(tasks):
            encoder.note(encoded.changes)
            yield encoded.data
        encoder.refuse_lost(item.modules)

    with staged_files(paths, force, inputs) as partials, progress.bar(label, 2 * len(plan)) as tick:
        refuse_lost(encoder, plan, tick)
        for number, (partial, shard) in enumerate(zip(partials, shards, strict=True)):

            def describe(writer: gguf.GGUFWriter, number: int = number) -> None:
                if number == 0:
                    _describe(writer, checkpoint, encoder.types, options)
                if len(shards) > 1:
                    writer.add_uint16("split.no", number)
                    writer.add_uint16("split.count", len(shards))
                    writer.add_int32("split.tensors.count", len(plan))

            write_shard(partial, architecture, shard, describe, pieces, tick)
    return paths


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint, types: Types, options: Options) -> None:
    """Add all metadata: the converter's keys, the origin of the codes, the importance matrix."""
    add_metadata(writer, checkpoint, FILE_TYPES[types.file_type].number)
    if options.importance is not None:
        writer.add_string("quantize.imatrix.file", options.importance.name)
        writer.add_string("quantize.imatrix.dataset", ", ".join(options.importance.datasets))
        writer.add_uint32("quantize.imatrix.entries_count", len(options.importance.entries))
        writer.add_uint32("quantize.imatrix.chunks_count", options.importance.chunks)
    if checkpoint.schemes:
        origin = provenance(checkpoint)
        writer.add_string("qwen3_export.version", __version__)
        writer.add_string("qwen3_export.source.sha256", origin["source"]["sha256"])
        writer.add_string("qwen3_export.recipe", origin["quantized"]["recipe"])
        if origin["experts"] is not None:
            writer.add_string(GGUF_KEY, json.dumps(origin["experts"]))
