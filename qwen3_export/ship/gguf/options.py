"""Options of a GGUF export, and errors for those that would change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.gguf_types import Overrides
from qwen3_export.core.imatrix import Imatrix
from qwen3_export.errors import InputError
from qwen3_export.ship.gguf.encode import Encoder
from qwen3_export.ship.gguf.types import Types
from qwen3_export.ship.gguf.write import Planned
from qwen3_export.ship.result import provenance

LEAST_SHARD = 1_000_000
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Options:
    """Options of an export beside the type.

    `importance` weighs the errors of rounding. `split_max_bytes` divides the file into shards. `allow_requantize`
    permits to round codes again, if no type holds them or another type is asked for. `threads` make the data, by
    default as many as there are processors; their number never changes the bytes.
    """

    overrides: Overrides = field(default_factory=Overrides)
    importance: Imatrix | None = None
    split_max_bytes: int | None = None
    allow_requantize: bool = False
    threads: int | None = None


def check_split_size(options: Options) -> None:
    """Raise InputError for shards of less than a megabyte, the least that llama-gguf-split takes."""
    if options.split_max_bytes is not None and options.split_max_bytes < LEAST_SHARD:
        raise InputError(
            f"--split-max-size: {options.split_max_bytes} bytes are too few for a shard",
            "give 1M at least, e.g. 4G: a number alone counts bytes",
        )


def larger_than_shards(plan: Sequence[Planned], options: Options) -> str | None:
    """A warning of tensors that no shard of the wanted size holds, or None."""
    limit = options.split_max_bytes
    large = [] if limit is None else sorted((item.nbytes, item.name) for item in plan if item.nbytes > limit)
    if not large:
        return None
    size, name = large[-1]
    others = f" (and {len(large) - 1} others)" if len(large) > 1 else ""
    return f"{name} has {size / 1e6:.1f} MB{others}, more than --split-max-size: it gets a larger shard of its own"


def without_experts(types: Types, num_experts: int) -> str | None:
    """A warning of a type for experts that a dense model gets, or None."""
    if types.file_type != "mxfp4_moe" or num_experts:
        return None
    return "mxfp4_moe is a type for experts, of which this model has none: other matrices get q8_0; mxfp4 is for all"


def check_overrides(plan: Sequence[Planned], types: Types, overrides: Overrides) -> None:
    """Raise InputError for a type that was asked for and that no tensor gets."""
    names = [item.name for item in plan if item.modules[0] in types.modules]
    decided = {_EMBEDDING} if overrides.token_embedding else set[str]()
    if overrides.output and _HEAD not in names:
        _check_tied_output(overrides)
    elif overrides.output:
        decided.add(_HEAD)
    for pattern, kind in overrides.patterns:
        alone, option = Overrides(((pattern, kind),)), f"--tensor-type {pattern}={kind}"
        matched = {name for name in names if alone.of(name)}
        if not matched:
            fixed = next((item.name for item in plan if alone.of(item.name)), None)
            reason = "" if fixed is None else f"; {fixed} is always of type f32"
            raise InputError(
                f"{option}: found in no name of a tensor that can have another type{reason}",
                f"names are such as {', '.join(names[:2] + names[-2:])}",
            )
        if matched <= decided:
            raise InputError(
                f"{option}: another option decides the type of {min(matched)} and of all others it is found in",
                "the first pattern that is found in a name decides: give this one before the others",
            )
        decided |= matched


def _check_tied_output(overrides: Overrides) -> None:
    """Raise InputError for the type of a tied head that is not the embedding's."""
    if overrides.token_embedding not in (None, overrides.output):
        other = f"--token-embedding-type {overrides.token_embedding}"
    elif overrides.token_embedding is None and (found := overrides.of(_EMBEDDING)) not in (None, overrides.output):
        other = f"--tensor-type for {_EMBEDDING}, {found},"
    else:
        return
    raise InputError(
        f"--output-type {overrides.output}: the head is the embedding here, and {other} decides its type",
        "give one of them, or the same type",
    )


def weighed_tensors(plan: Sequence[Planned], encoder: Encoder) -> list[str]:
    """The tensors whose rounding an importance would change, in it or not."""
    return [item.name for item in plan if any(encoder.weighs(module, item.type) for module in item.modules)]


def check_importance(plan: Sequence[Planned], encoder: Encoder, given: Imatrix) -> None:
    """Raise InputError when no tensor is rounded with the importance matrix."""
    rounded = weighed_tensors(plan, encoder)
    if any(name in encoder.importance for name in rounded):
        return
    if rounded:
        reason = f"it has none of the tensors that are rounded, such as {rounded[0]}"
    elif encoder.checkpoint.schemes:
        reason = "quantized weights are moved as they are"
    else:
        reason = f"{encoder.types.file_type} is not rounded by importance"
    raise InputError(
        f"--imatrix {given.name}: no weight would be rounded with it: {reason}",
        "leave --imatrix away, or export a 16-bit source without --recipe and with a --type that rounds, e.g. q4_k_m",
    )


def unweighed(plan: Sequence[Planned], encoder: Encoder, options: Options) -> str | None:
    """A warning of rounded tensors that the importance matrix lacks, or None.

    An embedding is never in it, so there is no warning for it.
    """
    given = options.importance
    if given is None:
        return None
    rounded = [name for name in weighed_tensors(plan, encoder) if name not in (_EMBEDDING, _HEAD)]
    missing = [name for name in rounded if name not in encoder.importance]
    if not missing:
        return None
    wanted = encoder.checkpoint.config.num_layers
    others = f" and {len(missing) - 1} others are" if missing[1:] else " is"
    depth = ""
    if given.layers < wanted:
        depth = f" It has {given.layers} of this model's {wanted} layers, and may be of another model."
    return (
        f"{given.name} lacks {len(missing)} of the {len(rounded)} tensors that importance would weigh: {missing[0]}"
        f"{others} rounded without.{depth} `qwen3-export calibrate` measures all of them"
    )


def another_model(checkpoint: Checkpoint, options: Options) -> str | None:
    """A warning of an importance matrix that names another model, or None.

    A matrix of `calibrate` has the name and the hash of its model. A model that was only renamed has the same hash.
    """
    given = options.importance
    name = None if given is None else given.provenance.get("source.name")
    if given is None or name is None:
        return None
    source = provenance(checkpoint)["source"]
    if name in (checkpoint.name, source["name"]):
        return None
    if given.provenance.get("source.sha256") in (checkpoint.sha256, source["sha256"]):
        return None
    return (
        f"{given.name} was measured on {name}, which is not {checkpoint.name}: its widths fit, but `qwen3-export "
        "calibrate` measures what this model needs"
    )
