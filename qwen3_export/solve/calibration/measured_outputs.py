"""Which outputs of a block have their importance measured (`calibration.fisher`)."""

from __future__ import annotations

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.qwen3 import Qwen3Config

# The name of what a layer's experts add to the residual stream.
OF_EXPERTS = "experts"


def measured_rows(config: Qwen3Config, layer: int) -> dict[str, int]:
    """Number of measured outputs of a block by local name.

    An expert's own linears are not among them; their sum is, as the last one.
    """
    rows = {name: shape[0] for name, shape in config.linear_shapes(layer).items() if not is_expert(name)}
    return {**rows, OF_EXPERTS: config.hidden_size} if config.is_sparse(layer) else rows
