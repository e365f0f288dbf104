"""The tensors of a GGUF file in their order, each with its matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qwen3_export.core.architecture import ROUTER, is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.gguf_types import block_length, gguf_name
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config, block_name
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.gguf.types import Types
from qwen3_export.ship.gguf.write import Planned

_OTHERS = {
    "input_layernorm": "attn_norm",
    ROUTER: "ffn_gate_inp",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_norm": "attn_q_norm",
}


def planned_tensors(checkpoint: Checkpoint, types: Types) -> Iterator[Planned]:
    """Every tensor of the file in its order: head, embedding, blocks, final norm."""
    config = checkpoint.config
    shapes = config.all_matrices()
    for module in (EMBEDDING,) if config.tie_word_embeddings else (HEAD, EMBEDDING):
        yield _matrix(shapes, types, module)
    for layer in range(config.num_layers):
        others, prefix = config.other_shapes(layer), block_name(layer)
        names = [*others, *config.linear_shapes(layer)]
        for local in sorted(name for name in names if not is_expert(name)):
            if local in others:
                yield _float(checkpoint, f"{prefix}.{local}", f"blk.{layer}.{_OTHERS[local]}")
            else:
                yield _matrix(shapes, types, f"{prefix}.{local}")
            if local == "input_layernorm" and config.is_sparse(layer):
                yield from _experts(config, types, layer)
    yield _float(checkpoint, "model.norm", "output_norm")


def _float(checkpoint: Checkpoint, module: str, name: str) -> Planned:
    """A norm or a router, always in fp32."""
    return Planned(f"{name}.weight", checkpoint.entry(f"{module}.weight").shape, "f32", (module,))


def _matrix(shapes: Mapping[str, tuple[int, int]], types: Types, module: str) -> Planned:
    return Planned(f"{gguf_name(module)}.weight", shapes[module], types.modules[module], (module,))


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


def check_stacks(config: Qwen3Config, types: Types) -> None:
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
