"""Options of a GGUF export, and errors for those that would change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3_export.core.gguf_types import Overrides
from qwen3_export.core.imatrix import Imatrix
from qwen3_export.errors import InputError
from qwen3_export.ship.gguf.encode import Encoder
from qwen3_export.ship.gguf.write import Planned


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
