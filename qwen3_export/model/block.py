"""One Qwen3 decoder block, dense or MoE, run stage by stage (`core.architecture`).

    hidden ─ input_layernorm ─▶ q,k,v ─ q/k norm, RoPE, attention ─▶ o ─ + residual ─┐
    ┌──────────────────────────────────────────────────────────────────────────────────┘
    └ post_attention_layernorm ─▶ gate,up ─ SwiGLU ─▶ down ─ + residual ─▶ hidden

Between stages the state of a sequence is `residual` and `x`, the input of the next linears. A
solver looks at `x`, replaces those weights, and lets the state advance through them. In a sparse
layer `x` is sent to `experts` `[…, k]` with weights `mix` `[…, k]`; before stage 3 it is
`[…, k, moe_intermediate]`.

Linears and attention multiply in the type of the weights, fp32 or bf16. The residual stream, norms,
rotary embedding and router are fp32 always.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_export.core.architecture import ATTENTION, ROUTER, SWIGLU, Stage, expert_of, is_expert
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.model.attention import causal_attention
from qwen3_export.model.routing import route
from qwen3_export.model.streamed import StreamedWeights

if TYPE_CHECKING:
    from qwen3_export.model.integer_linear import IntegerLinear

State = dict[str, Tensor]
# An expert's tokens are padded to a power of two, and above this number to a multiple of it.
_TOKENS = 64


@dataclass
class KVCache:
    """Keys and values so far, `[batch, kv_heads, length, head_dim]` each."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions and return everything."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        self.keys, self.values = keys, values
        return keys, values


@dataclass
class Block:
    """Weights of one block by local name (`self_attn.q_proj`, `[out, in]`), replaceable one by one.

    `matmul_dtype` is the type that linears and attention multiply in; None stands for the type of the weights.
    `rounders` are the functions that round some linears' inputs (`model.activations`). Where `outputs` is given, every
    linear leaves its output there. `routing_noise` smooths the router's choices (`model.routing`). `integer_linears`
    are multiplied as integers and are not in `weights`; with `int_matmul`, for processors where that is fastest,
    linears become such as soon as they are quantized.
    """

    config: Qwen3Config
    layer: int
    weights: MutableMapping[str, Tensor] = field(repr=False)
    matmul_dtype: torch.dtype | None = None
    rounders: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict, repr=False)
    outputs: dict[str, Tensor] | None = field(default=None, repr=False)
    int_matmul: bool = False
    integer_linears: dict[str, IntegerLinear] = field(default_factory=dict, repr=False)
    routing_noise: float = 0.0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of this block, in the order they run."""
        return self.config.block(self.layer).stages

    def stage_of(self, name: str) -> Stage:
        """The stage that reads a linear's input, by local name."""
        return self.config.block(self.layer).stage_of(name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x @ weight.T`, the inputs rounded first where the linear's scheme says so."""
        y = self.integer_linears[name].product(x) if name in self.integer_linears else self._plain(name, x)
        if self.outputs is not None:
            self.outputs[name] = y
        return y

    def _plain(self, name: str, x: Tensor) -> Tensor:
        rounder = self.rounders.get(name)
        weight = self._running(name)
        x = (x if rounder is None else rounder(x)).to(weight.dtype)
        return _product(x, weight) if is_expert(name) else F.linear(x, weight)

    def _running(self, name: str) -> Tensor:
        """A weight in the type of the products."""
        if self.matmul_dtype is None:
            return self.weights[name]
        if isinstance(self.weights, StreamedWeights):
            return self.weights.running(name, self.matmul_dtype)
        return self.weights[name].to(self.matmul_dtype)

    def running(self, matmul_dtype: torch.dtype) -> Block:
        """A copy whose linears are stored as they multiply: `matmul_dtype` or integers."""
        linears = self.config.linear_shapes(self.layer)
        weights: MutableMapping[str, Tensor]
        if isinstance(self.weights, StreamedWeights):
            weights = self.weights.in_type(matmul_dtype, linears)
        else:
            weights = {
                name: weight.to(matmul_dtype) if name in linears else weight for name, weight in self.weights.items()
            }
        own = replace(
            self,
            weights=weights,
            matmul_dtype=matmul_dtype,
            rounders=dict(self.rounders),
            integer_linears=dict(self.integer_linears),
        )
        if self.int_matmul:
            own._round(list(linears))
        return own

    def _round(self, linears: list[str]) -> None:
        """Turn linears that still have weights into integer linears where possible."""
        from qwen3_export.model.integer_linear import from_weight

        for name in linears:
            if name in self.weights and (codes := from_weight(self.weights[name])) is not None:
                self.integer_linears[name] = codes
                del self.weights[name]

    def width(self, name: str) -> int:
        """Number of inputs of a linear, or of the router."""
        shapes = self.config.linear_shapes(self.layer)
        return shapes[name][1] if name in shapes else self.weights[name].shape[1]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last axis, in fp32."""
        if self.int_matmul:
            from qwen3_export.model.passes import normed

            return normed(x.to(self.weights[name].dtype), self.weights[name], self.config.rms_norm_eps)
        return rms_norm(x.to(self.weights[name].dtype), self.weights[name], self.config.rms_norm_eps)

    def initial_state(self, hidden: Tensor) -> State:
        """State before the first stage, from hidden states `[batch, tokens, hidden]`."""
        return {"residual": hidden, "x": self._in_matmul_dtype(self._stage_norm(self.stages[0], hidden))}

    def _stage_norm(self, stage: Stage, residual: Tensor) -> Tensor:
        assert stage.norm is not None
        return self.norm(stage.norm, residual)

    def _in_matmul_dtype(self, x: Tensor) -> Tensor:
        return x if self.matmul_dtype is None else x.to(self.matmul_dtype)

    def advance(self, stage: int, state: State, rope: tuple[Tensor, Tensor], cache: KVCache | None = None) -> State:
        """Run the linears of `stage`, up to the next linears' input."""
        now, later = self.stages[stage], self.stages[stage + 1 :]
        if now.follows == ATTENTION:
            return {**state, "x": self._attend(now, state["x"], rope, cache)}
        outputs = self._routed(now, state) if now.routed else self.combine(now, now.groups[0], state["x"])
        if not now.writes_residual:
            return {**state, "x": outputs}
        if now.routed:
            # One sample at a time: all chosen experts' outputs in fp32 are large.
            mixed = [(out * mix.unsqueeze(-1)).sum(-2) for out, mix in zip(outputs, state["mix"], strict=True)]
            outputs = torch.stack(mixed)
        residual = state["residual"] + outputs
        if not later:
            return {"residual": residual}
        state = self._route(later[0], {"residual": residual, "x": self._stage_norm(later[0], residual)})
        return {**state, "x": self._in_matmul_dtype(state["x"])}

    def combine(self, stage: Stage, names: list[str], x: Tensor) -> Tensor:
        """A stage's or expert's linears and activation function, `[…, in]` to `[…, n]`."""
        outputs = [self.linear(name, x) for name in names]
        return F.silu(outputs[0]) * outputs[1] if stage.follows == SWIGLU else outputs[0]

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """Hidden states in, hidden states out, `[batch, tokens, hidden]`."""
        state = self.initial_state(hidden)
        for stage in range(len(self.stages)):
            state = self.advance(stage, state, rope, cache)
        return state["residual"]

    def inputs_of(self, name: str, state: State) -> Tensor:
        """The vectors `[n, in]` that reach one linear, or the router.

        The state must be at the stage that reads them.
        """
        x = state["x"]
        if not is_expert(name):
            return x.reshape(-1, x.shape[-1])
        stage = self.config.block(self.layer).stage_of(name)
        return _reaching(stage, x, state["experts"] == expert_of(name))

    def _attend(self, stage: Stage, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        queries, keys, values = stage.names
        q = self._turned(queries, f"{stage.prefix}.q_norm", x, rope)
        k = self._turned(keys, f"{stage.prefix}.k_norm", x, rope)
        v = self._heads(values, x).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        length, total = q.shape[-2], k.shape[-2]
        if length == total and (self.int_matmul or (q.dtype == torch.bfloat16 and q.device.type == "cpu")):
            return causal_attention(q, k, v).transpose(1, 2).flatten(2)
        mask = None
        if 1 < length < total:
            mask = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=length == total, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x).reshape(*x.shape[:-1], -1, self.config.head_dim)

    def _turned(self, linear: str, norm: str, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys after norm and rotary embedding, `[batch, heads, tokens, head_dim]`."""
        heads = self._heads(linear, x)
        halves = heads.dtype == torch.bfloat16 and heads.device.type == "cpu" and not heads.requires_grad
        if halves or self.int_matmul:
            from qwen3_export.model.passes import normed_and_turned

            return normed_and_turned(heads, self.weights[norm], self.config.rms_norm_eps, *rope)
        return rotate(self.norm(norm, heads.transpose(1, 2)), *rope).to(heads.dtype)

    def _route(self, stage: Stage, state: State) -> State:
        """Choose each token's experts."""
        if not stage.routed:
            return state
        logits = F.linear(state["x"], self.weights[ROUTER])
        return {**state, **route(logits, self.config, self.routing_noise)}

    def _routed(self, stage: Stage, state: State) -> Tensor:
        """Outputs of the chosen experts for their tokens, `[…, k, n]`."""
        x, experts = state["x"], state["experts"]
        width = stage.linears[0].out_features
        out = x.new_zeros(*experts.shape, width)
        for expert in torch.unique(experts).tolist():
            chosen = experts == expert
            out[chosen] = self.combine(stage, stage.groups[expert], _reaching(stage, x, chosen))
        return out


def _reaching(stage: Stage, x: Tensor, chosen: Tensor) -> Tensor:
    """The inputs `[n, in]` of one expert.

    `chosen` `[…, k]` marks its tokens; `x` is theirs alone, or the layer's.
    """
    return x[chosen.any(-1)] if stage.norm else x[chosen]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` for the tokens `[n, in]` of one expert.

    The tokens are padded to one of few lengths. torch makes a kernel of its own for every shape of 16-bit products,
    which takes longer than such a small product.
    """
    count = len(x)
    filled = min(1 << max(count - 1, 0).bit_length(), -(-count // _TOKENS) * _TOKENS)
    return F.linear(F.pad(x, (0, 0, 0, filled - count)), weight)[:count]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[batch, heads, tokens, head_dim]`.

    Pair i is (i, i + head_dim / 2).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
