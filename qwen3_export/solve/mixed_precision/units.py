"""The units that mixed precision mixes: linears of one block that share a scheme.

    fused      q,k,v │ o │ gate,up │ down      vLLM and SGLang multiply these together
    separate   q │ k │ v │ o │ gate │ up │ down

In a sparse block a unit has the linears of all experts. If asked for, the embedding is a unit before block 0, and an
untied head a unit after the last block.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config
from qwen3_export.core.scheme import QuantScheme

OUTER = -1


@dataclass(frozen=True)
class Unit:
    """Linears of one block and stage, or at stage `OUTER` embedding or head.

    `shapes` are `{local name: [out, in]}`, `pattern` is the shell pattern of these names.
    """

    layer: int
    stage: int
    pattern: str
    shapes: Mapping[str, tuple[int, int]] = field(hash=False)

    @property
    def match(self) -> str:
        """The pattern of a recipe's rule for this unit."""
        return self.pattern if self.stage == OUTER else f"*.layers.{self.layer}.{self.pattern}"

    @property
    def kind(self) -> str:
        """The pattern of a rule for units of this kind in all blocks."""
        return self.pattern if self.stage == OUTER else f"*.{self.pattern}"

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def bits(self, scheme: QuantScheme | None) -> int:
        """Storage in bits, scales and zero points included; None is 16 bits."""
        if scheme is None:
            return 16 * self.weights
        return sum(round(scheme.bits_per_weight(shape) * math.prod(shape)) for shape in self.shapes.values())

    def sharing_input(self) -> Iterator[list[str]]:
        """Local names of linears that read the same input: all, or an expert's."""
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.shapes)
        yield from ([name for name in self.shapes if name.rpartition(".")[0] == owner] for owner in owners)


def units(config: Qwen3Config, fused: bool, outer: bool = False) -> list[Unit]:
    """All units of a model in running order, embedding and head if `outer`."""
    ends = [Unit(-1, OUTER, EMBEDDING, {EMBEDDING: config.outer_matrices()[EMBEDDING]})]
    found = ends if outer else []
    for layer in range(config.num_layers):
        shapes = config.linear_shapes(layer)
        for number, stage in enumerate(config.block(layer).stages):
            for pattern in stage.patterns(fused):
                members = {name: shape for name, shape in shapes.items() if fnmatch.fnmatchcase(name, pattern)}
                found.append(Unit(layer, number, pattern, members))
    if outer and not config.tie_word_embeddings:
        found.append(Unit(config.num_layers, OUTER, HEAD, {HEAD: config.outer_matrices()[HEAD]}))
    return found
