"""The units that mixed precision mixes: linears of one block that share a scheme.

    fused      q,k,v │ o │ gate,up │ down      vLLM and SGLang multiply these together
    separate   q │ k │ v │ o │ gate │ up │ down

In a sparse block a unit has the linears of all experts. Where asked, the embedding is a unit before block 0
and the head one behind the last block; of a tied model the one matrix is the first of these.
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
    """Linears of one block and stage, by local name `{name: [out, in]}`.

    Or, at stage `OUTER`, embedding or head.
    """

    layer: int
    stage: int
    pattern: str
    shapes: Mapping[str, tuple[int, int]] = field(hash=False)

    @property
    def match(self) -> str:
        """The pattern of a recipe's rule."""
        return self.pattern if self.stage == OUTER else f"*.layers.{self.layer}.{self.pattern}"

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
        """Local names of the linears that read the same input.

        They are all of the unit's, or those of one expert.
        """
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.shapes)
        yield from ([name for name in self.shapes if name.rpartition(".")[0] == owner] for owner in owners)


def units(config: Qwen3Config, fused: bool, outer: bool = False) -> list[Unit]:
    """All units of a model, in the order they run.

    With embedding and head if `outer`.
    """
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
