"""A sparse layer's experts for an ONNX graph, read one by one.

router    [experts, hidden]                        fp32 scores, in every flavor
codes     [experts, out, in · bits / 8]            one input for all experts of a layer
scales    [experts, out, groups]                   and zero points

`ship.onnx.qmoe` writes them as ONNX Runtime's fused operator. `ship.onnx.routed` writes a loop in ai.onnx operators
over the experts that the router chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.architecture import ROUTER, Linear, Stage
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.result import not_integer

QMOE, LOOP = "QMoE", "loop of ai.onnx operators"
Weights = QuantizedTensor | NDArray


@dataclass(frozen=True)
class SparseLayer:
    """The experts of one layer of a checkpoint, read when asked for."""

    checkpoint: Checkpoint
    layer: int

    @property
    def name(self) -> str:
        """The prefix of the names of the layer's nodes."""
        return f"layer.{self.layer}.experts"

    @property
    def router(self) -> NDArray[np.float32]:
        """The router's matrix `[experts, hidden]`."""
        return self.checkpoint.read(f"{block_name(self.layer)}.{ROUTER}.weight").astype(np.float32)

    @property
    def stages(self) -> list[Stage]:
        """The stages that the router sends tokens through."""
        return [stage for stage in self.checkpoint.config.block(self.layer).stages if stage.routed]

    @property
    def parts(self) -> list[str]:
        """Names of an expert's linears, in the order they run."""
        return [linear.name for stage in self.stages for linear in stage.linears]

    @cached_property
    def schemes(self) -> dict[str, QuantScheme | None]:
        """Each part's scheme, None for 16 bits.

        Raises UnsupportedError when the experts of a part differ.
        """
        return {part: self._scheme(part) for part in self.parts}

    def _scheme(self, part: str) -> QuantScheme | None:
        stage, linear = self._linear(part)
        modules = [f"{block_name(self.layer)}.{prefix}.{part}" for prefix in stage.prefixes]
        first = self.checkpoint.schemes.get(modules[0])
        for module in modules:
            if (found := self.checkpoint.schemes.get(module)) != first:
                labels = [scheme.label if scheme else "16 bits" for scheme in (first, found)]
                raise UnsupportedError(
                    f"{module} is {labels[1]}, {modules[0]} {labels[0]}: an ONNX graph stacks a layer's experts",
                    "give all experts of a layer one scheme, by a rule that matches mlp.experts.*",
                )
        if first and linear.in_features % first.group_length(linear.in_features):
            raise UnsupportedError(
                f"{modules[0]} is {first.label}: its {linear.in_features} inputs are no whole number of groups",
                "quantize with groups that divide it, or with one scale per channel",
            )
        return first

    def module(self, expert: int, part: str) -> str:
        """Name of one expert's matrix."""
        stage, _ = self._linear(part)
        return f"{block_name(self.layer)}.{stage.prefixes[expert]}.{part}"

    def shape(self, part: str) -> tuple[int, int]:
        """`[out, in]` of one expert's matrix."""
        _, linear = self._linear(part)
        return linear.out_features, linear.in_features

    def _linear(self, part: str) -> tuple[Stage, Linear]:
        return next((stage, linear) for stage in self.stages for linear in stage.linears if linear.name == part)

    def read(self, *parts: str) -> Iterator[list[Weights]]:
        """Some matrices of each expert, one expert at a time."""
        for expert in range(self.checkpoint.config.num_experts):
            yield [self.checkpoint.linear(self.module(expert, part)) for part in parts]


def supports(scheme: QuantScheme) -> str | None:
    """Why no graph can hold experts in a scheme, or None.

    Schemes that QMoE cannot hold are written in ai.onnx operators.
    """
    if scheme.ggml_type is not None or (scheme.type, scheme.num_bits) == ("float", 4):
        return not_integer(scheme)
    if scheme.num_bits not in (2, 4, 8):
        return f"experts of {scheme.num_bits} bits have no place in ONNX: 2, 4 and 8 are packed into whole bytes"
    return None


def sparse_layers(checkpoint: Checkpoint) -> list[SparseLayer]:
    """The checkpoint's sparse layers; UnsupportedError names an expert that differs."""
    layers = [SparseLayer(checkpoint, layer) for layer in checkpoint.config.sparse_layers]
    for layer in layers:
        _ = layer.schemes
    return layers


def expressions(layers: Sequence[SparseLayer], reason_of: Callable[[SparseLayer], str | None]) -> list[dict[str, Any]]:
    """The operator of each sparse layer, for manifest and result.

    Where it is not the fused one, the reason is given.
    """
    groups: dict[str | None, list[int]] = {}
    for layer in layers:
        groups.setdefault(reason_of(layer), []).append(layer.layer)
    return [
        {"operator": LOOP if reason else QMOE, "layers": numbers, "reason": reason}
        for reason, numbers in groups.items()
    ]
