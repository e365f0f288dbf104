"""A decoder block described as data, which every part of the package reads.

    stage   linears                  read the output of                   are followed by
    0       q_proj  k_proj  v_proj   input_layernorm                      attention
    1       o_proj                   attention: v_proj's rows, mixed      the residual stream
    2       gate_proj  up_proj       post_attention_layernorm             SwiGLU
    3       down_proj                SwiGLU: up_proj's rows, scaled       the residual stream

In a sparse block stages 2 and 3 exist once per expert, and the router sends each token to a few of them.
The forward pass, the solve, folds, mixed precision, ONNX and GGUF take names, shapes, stages and order from
here, so that a new variant of the architecture needs a new description and little else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from qwen3_export.core.qwen3 import Qwen3Config

# What follows the linears of a stage.
ATTENTION, SWIGLU, RESIDUAL = "attention", "swiglu", "residual"
# The router of a sparse block, by its name inside the block.
ROUTER = "mlp.gate"
# What stands before an expert's number in a linear's name.
EXPERTS = ".experts."


def is_expert(name: str) -> bool:
    """Whether a linear belongs to an expert, by its module name or local name."""
    return EXPERTS in name


def expert_of(name: str) -> int:
    """Number of a linear's expert, from its module name or local name."""
    return int(name.partition(EXPERTS)[2].partition(".")[0])


@dataclass(frozen=True)
class Linear:
    """A weight matrix `[out_features, in_features]`, by its name behind the prefix of its stage."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read the same input.

    `norm` is the norm whose output they read. Where there is none, input channel i is a row of the linear `source`,
    which has the same prefix; with grouped-query attention, `queries_per_head` heads of `head_dim` inputs share the
    rows of one head of the source. `follows` is the operation that makes the next stage's input from their outputs.
    `pattern` is a shell pattern that matches these linears and no others. `experts` is 0 in a dense stage; otherwise
    every expert has these linears, and a token passes through those of the experts that the router chose.
    """

    prefix: str
    linears: tuple[Linear, ...]
    pattern: str
    follows: str
    norm: str | None = None
    source: str | None = None
    experts: int = 0
    head_dim: int = 1
    queries_per_head: int = 1

    @property
    def writes_residual(self) -> bool:
        """Whether the outputs are added to the residual stream."""
        return self.follows == RESIDUAL

    @property
    def routed(self) -> bool:
        """Whether the router chooses which of the linears a token reads."""
        return self.experts > 0

    @property
    def in_features(self) -> int:
        """Number of inputs of each linear."""
        return self.linears[0].in_features

    @cached_property
    def prefixes(self) -> list[str]:
        """The modules that hold these linears: one, or one per expert."""
        return [f"{self.prefix}{EXPERTS}{expert}" for expert in range(self.experts)] or [self.prefix]

    @cached_property
    def groups(self) -> list[list[str]]:
        """Local names of the linears that read one input, group by group.

        There is one group, or one per expert.
        """
        return [[f"{prefix}.{linear.name}" for linear in self.linears] for prefix in self.prefixes]

    @property
    def names(self) -> list[str]:
        """Local names of all linears, in the order they run."""
        return [name for group in self.groups for name in group]

    def patterns(self, fused: bool) -> list[str]:
        """Shell patterns of the linears' local names; a single one if `fused`."""
        prefix = f"{self.prefix}{EXPERTS}*" if self.routed else self.prefix
        return [f"{prefix}.{name}" for name in ([self.pattern] if fused else [item.name for item in self.linears])]

    def source_rows(self) -> NDArray[np.int64]:
        """The row of `source` that each input channel comes from, `[in]`."""
        column = np.arange(self.in_features)
        return column // self.head_dim // self.queries_per_head * self.head_dim + column % self.head_dim


@dataclass(frozen=True)
class BlockDescription:
    """A block: its stages in running order, shapes of norms and router."""

    stages: tuple[Stage, ...]
    other_shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`{local name: [out, in]}` of all linears, in the order they run."""
        return {
            f"{prefix}.{linear.name}": (linear.out_features, linear.in_features)
            for stage in self.stages
            for prefix in stage.prefixes
            for linear in stage.linears
        }

    @cached_property
    def _stages(self) -> dict[str, Stage]:
        return {name: stage for stage in self.stages for name in stage.names}

    def stage_of(self, name: str) -> Stage:
        """The stage of a linear, by local name."""
        return self._stages[name]


@lru_cache(maxsize=64)
def describe_block(config: Qwen3Config, sparse: bool) -> BlockDescription:
    """The description of a dense or a sparse Qwen3 block."""
    hidden, head = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_heads * head, config.num_kv_heads * head
    inner, experts = (config.moe_intermediate_size, config.num_experts) if sparse else (config.intermediate_size, 0)
    stages = (
        Stage(
            "self_attn", (Linear("q_proj", heads, hidden), Linear("k_proj", kv_heads, hidden),
            Linear("v_proj", kv_heads, hidden)), "[qkv]_proj", ATTENTION, norm="input_layernorm",
        ),
        Stage(
            "self_attn", (Linear("o_proj", hidden, heads),), "o_proj", RESIDUAL, source="v_proj",
            head_dim=head, queries_per_head=config.num_heads // config.num_kv_heads,
        ),
        Stage(
            "mlp", (Linear("gate_proj", inner, hidden), Linear("up_proj", inner, hidden)), "[gu]*_proj", SWIGLU,
            norm="post_attention_layernorm", experts=experts,
        ),
        Stage("mlp", (Linear("down_proj", hidden, inner),), "down_proj", RESIDUAL, source="up_proj", experts=experts),
    )  # fmt: skip
    others: list[tuple[str, tuple[int, ...]]] = [
        ("input_layernorm", (hidden,)),
        ("self_attn.q_norm", (head,)),
        ("self_attn.k_norm", (head,)),
        ("post_attention_layernorm", (hidden,)),
    ]
    return BlockDescription(stages, (*others, *([(ROUTER, (experts, hidden))] if sparse else [])))
