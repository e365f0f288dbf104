"""What a Qwen3 checkpoint is: its configuration, its tensors' names and shapes, its linears.

model.embed_tokens                       [vocab, hidden]
model.layers.N.input_layernorm           [hidden]
              .self_attn.q_proj          [heads * head_dim, hidden]      k_proj, v_proj: kv_heads
              .self_attn.q_norm, k_norm  [head_dim]
              .self_attn.o_proj          [hidden, heads * head_dim]
              .post_attention_layernorm  [hidden]
dense         .mlp.gate_proj, up_proj    [intermediate, hidden]          down_proj: transposed
MoE           .mlp.gate                  [experts, hidden]               the router
              .mlp.experts.E.gate_proj …                                 as dense, moe_intermediate
model.norm                               [hidden]
lm_head                                  [vocab, hidden]                 absent when tied
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_export.core.architecture import BlockDescription, describe_block
from qwen3_export.core.config_values import read_flag, read_number, read_size
from qwen3_export.core.rope import Rope, read_rope
from qwen3_export.errors import CheckpointError

MODEL_TYPES = ("qwen3", "qwen3_moe")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
FINAL_NORM = "model.norm.weight"
# Far above any model; a damaged number must not fill the memory with tensor names.
_MOST_LAYERS, _MOST_EXPERTS = 1000, 1024


@dataclass(frozen=True)
class Qwen3Config:
    """The architecture's numbers, whichever release of transformers wrote the file."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position: int
    tie_word_embeddings: bool
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    sparse_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return layer in self.sparse_layers

    @property
    def expert_width(self) -> int:
        """Inputs of an expert's widest linear."""
        return max(self.hidden_size, self.moe_intermediate_size)

    def block(self, layer: int) -> BlockDescription:
        """Stages, linears, norms and router of one block."""
        return describe_block(self, self.is_sparse(layer))

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """`{local name: [out, in]}` of one block's linears, in running order."""
        return dict(self.block(layer).linear_shapes)

    def other_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """`{local name: shape}` of one block's norms and router, always in 16 bits."""
        return dict(self.block(layer).other_shapes)

    def all_linears(self) -> dict[str, tuple[int, int]]:
        """`{module name: [out, in]}` of every quantizable linear of the model."""
        return {
            f"{block_name(layer)}.{name}": shape
            for layer in range(self.num_layers)
            for name, shape in self.linear_shapes(layer).items()
        }

    def outer_matrices(self) -> dict[str, tuple[int, int]]:
        """`{module name: [vocab, hidden]}` of the embedding and, when untied, the head."""
        names = (EMBEDDING,) if self.tie_word_embeddings else (EMBEDDING, HEAD)
        return dict.fromkeys(names, (self.vocab_size, self.hidden_size))

    def all_matrices(self) -> dict[str, tuple[int, int]]:
        """`{module name: [out, in]}` of linears, embedding and untied head."""
        return {**self.all_linears(), **self.outer_matrices()}

    @property
    def head_module(self) -> str:
        """The module whose matrix the output head multiplies by: the embedding when tied."""
        return EMBEDDING if self.tie_word_embeddings else HEAD

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """`{tensor name: shape}` of what lies outside the blocks; `lm_head` only when untied."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size),
            FINAL_NORM: (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """`{tensor name: shape}` of every tensor that a 16-bit checkpoint must hold."""
        shapes = self.outer_shapes()
        for layer in range(self.num_layers):
            inner = {**self.other_shapes(layer), **self.linear_shapes(layer)}
            shapes.update({f"{block_name(layer)}.{name}.weight": shape for name, shape in inner.items()})
        return shapes

    @property
    def num_parameters(self) -> int:
        """Weights in total, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def block_name(layer: int) -> str:
    """Module name of a decoder block."""
    return f"model.layers.{layer}"


def parse_config(values: object, where: str) -> Qwen3Config:
    """Read a `config.json` as written by transformers 4.x or 5.x.

    Raises CheckpointError naming `where`, the key, what was found and what was expected.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, found {type(values).__name__}")
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}, no Qwen3 model",
            f"supported architectures: {', '.join(MODEL_TYPES)} (text models of the Qwen3 family)",
        )
    _refuse_unsupported(values, where)
    hidden, heads = read_size(values, "hidden_size", where), read_size(values, "num_attention_heads", where)
    config = Qwen3Config(
        model_type=model_type,
        vocab_size=read_size(values, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=read_size(values, "intermediate_size", where),
        num_layers=read_size(values, "num_hidden_layers", where, most=_MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=read_size(values, "num_key_value_heads", where, default=heads),
        # transformers' defaults: dense configurations have one, MoE configurations derive it.
        head_dim=read_size(values, "head_dim", where, default=128 if model_type == "qwen3" else hidden // heads or 1),
        rms_norm_eps=read_number(values, "rms_norm_eps", where, 1e-6),
        rope=read_rope(values, where),
        max_position=read_size(values, "max_position_embeddings", where),
        tie_word_embeddings=read_flag(values, "tie_word_embeddings", where),
        **(_experts(values, where) if model_type == "qwen3_moe" else {}),
    )
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise CheckpointError(
            f"{where}: {config.num_heads} query heads, {config.num_kv_heads} key/value heads of "
            f"{config.head_dim}: heads must be a multiple of key/value heads and head_dim even"
        )
    return config


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    for key in ("attention_bias", "use_sliding_window"):
        if values.get(key):
            raise CheckpointError(f"{where}: {key}: true is not supported (no published Qwen3 model uses it)")
    if values.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {values['hidden_act']!r}, only 'silu' is known for Qwen3")


def _experts(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    layers = read_size(values, "num_hidden_layers", where, most=_MOST_LAYERS)
    step = read_size(values, "decoder_sparse_step", where, default=1)
    dense_only = values.get("mlp_only_layers") or []
    if not isinstance(dense_only, list):
        raise CheckpointError(f"{where}: mlp_only_layers is {dense_only!r}, a list of layers was expected")
    spelled = "num_experts" if values.get("num_local_experts") is None else "num_local_experts"
    experts = read_size(values, spelled, where, most=_MOST_EXPERTS)
    per_token = read_size(values, "num_experts_per_tok", where, default=8)
    if per_token > experts:
        raise CheckpointError(f"{where}: num_experts_per_tok is {per_token}, but there are {experts} experts")
    return {
        "num_experts": experts,
        "experts_per_token": per_token,
        "moe_intermediate_size": read_size(values, "moe_intermediate_size", where),
        "norm_topk_prob": read_flag(values, "norm_topk_prob", where),
        "sparse_layers": tuple(i for i in range(layers) if i not in dense_only and (i + 1) % step == 0),
    }
