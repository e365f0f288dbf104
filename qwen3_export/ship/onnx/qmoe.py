"""Experts as ONNX Runtime's fused operator `com.microsoft.QMoE`.

    fc1        uint8 [experts, 2 · inner, hidden · bits / 8]   gate and up row by row: g0, u0, g1, u1 …
    fc2        uint8 [experts, hidden, inner · bits / 8]       codes low bits first
    scales     [experts, rows, groups], or [experts, rows]     zero points packed along the groups

The operator takes the top k of the router's scores itself. With `normalize_routing_weights` it weighs them by
the softmax over the chosen, which is Hugging Face's rule for `norm_topk_prob`; else the graph gives it the softmax
over all experts. Its inputs: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core import pack
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.ship.onnx.experts import SparseLayer
from qwen3_export.ship.onnx.graph import CONTRIB, GraphBuilder
from qwen3_export.ship.onnx.library import ir

_BLOCKS = (16, 32, 64, 128, 256)
_INT8_ACTIVATIONS = 4
# CUDA's kernels read inputs in tiles of this many, and take groups of these sizes.
_CUDA_TILE, _CUDA_BLOCKS = 64, (32, 64, 128)


def cannot_hold(layer: SparseLayer, level: int, provider: str = "cpu") -> str | None:
    """Why a provider's QMoE does not compute experts as `level` promises, or None.

    `provider` is cpu, cuda or webgpu. What the last two refuse was read in ONNX Runtime's kernels.
    """
    schemes = set(layer.schemes.values())
    if None in schemes:
        return "QMoE has no 16-bit experts"
    if len(schemes) > 1:
        return "QMoE wants gate, up and down of one scheme"
    scheme = schemes.pop()
    assert scheme is not None
    if scheme.type == "float" or scheme.activations or scheme.strategy not in ("group", "channel"):
        return f"QMoE has no {scheme.label} experts"
    if provider != "cpu" and (reason := _ON_A_GPU[provider](layer, scheme)):
        return reason
    if scheme.strategy == "channel":
        return None if scheme.num_bits in (4, 8) else "QMoE has no 2-bit codes with one scale per channel"
    if scheme.group_size not in _BLOCKS:
        return f"QMoE needs a group_size that is a power of two from 16 to 256, not {scheme.group_size}"
    if provider == "cpu" and (_always_rounds(scheme) or (level != _INT8_ACTIVATIONS and scheme.num_bits == 8)):
        return f"QMoE rounds activations to int8 beside {scheme.num_bits}-bit groups of {scheme.group_size}"
    return None


def _always_rounds(scheme: QuantScheme) -> bool:
    """Whether nothing makes the CPU's kernel exact; `run.exact_graph` does with 8 bits."""
    return scheme.num_bits == 2 and scheme.group_size != _BLOCKS[0]


def _cuda(layer: SparseLayer, scheme: QuantScheme) -> str | None:
    """CUDA: 4 and 8 bits, whole tiles of inputs, zero points in groups alone."""
    config = layer.checkpoint.config
    widths = (config.hidden_size, config.moe_intermediate_size)
    if scheme.num_bits not in (4, 8):
        return f"QMoE on CUDA has 4 and 8 bits, not {scheme.num_bits}"
    if any(width % _CUDA_TILE for width in widths):
        return f"QMoE on CUDA needs widths divisible by {_CUDA_TILE}, not {' and '.join(map(str, widths))}"
    if scheme.strategy == "channel":
        return None if scheme.symmetric else "QMoE on CUDA has zero points in groups alone"
    if scheme.group_size not in _CUDA_BLOCKS:
        return f"QMoE on CUDA has groups of {', '.join(map(str, _CUDA_BLOCKS))}, not {scheme.group_size}"
    return None


def _webgpu(layer: SparseLayer, scheme: QuantScheme) -> str | None:
    """Why ONNX Runtime's WebGPU operator cannot hold a layer, or None."""
    if scheme.num_bits not in (4, 8):
        return f"QMoE in a browser has 4 and 8 bits, not {scheme.num_bits}"
    if not scheme.symmetric:
        return "QMoE in a browser has no zero points"
    if not layer.checkpoint.config.norm_topk_prob:
        return "QMoE in a browser weighs experts by the softmax over the chosen ones alone (norm_topk_prob)"
    return None


_ON_A_GPU = {"cuda": _cuda, "webgpu": _webgpu}


def experts(
    graph: GraphBuilder, x: ir.Value, layer: SparseLayer, level: int, dtype: ir.DataType, provider: str = "cpu"
) -> ir.Value:
    """The sum of the chosen experts' outputs, in the shape of `x`.

    `x` is `[batch, sequence, hidden]`.
    """
    config, name, op = layer.checkpoint.config, layer.name, graph.op
    scores = router_scores(graph, x, layer, dtype)
    first, second = _stacked(graph, layer, "fc1", dtype), _stacked(graph, layer, "fc2", dtype)
    inputs: list[ir.Value | None] = [x, scores, *first[:2], None, *second[:2], *[None] * 4, first[2], second[2]]
    if not config.norm_topk_prob:
        inputs += [None, op("Softmax", [scores], f"{name}.weights", axis=-1)]
    while inputs[-1] is None:
        inputs.pop()
    scheme = layer.schemes[layer.parts[-1]]
    assert scheme is not None
    grain = {} if scheme.strategy == "channel" else {"block_size": int(scheme.group_size or 0)}
    return op(
        "QMoE",
        inputs,
        name,
        CONTRIB,
        k=config.experts_per_token,
        activation_type="swiglu",
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_fusion=1,
        normalize_routing_weights=int(config.norm_topk_prob),
        expert_weight_bits=scheme.num_bits,
        **_newer_attributes(level, provider),
        **grain,
    )


def _newer_attributes(level: int, provider: str) -> dict[str, int]:
    """Attributes that ONNX Runtime knows since 1.31, where they say anything.

    An older one, such as that of transformers.js, does not load a graph with them.
    """
    if provider == "cuda":
        # The codes as they are: without it CUDA expects a layout of its own.
        return {"weights_prepacked": 0}
    return {"accuracy_level": level} if provider == "cpu" and level else {}


def router_scores(graph: GraphBuilder, x: ir.Value, layer: SparseLayer, dtype: ir.DataType) -> ir.Value:
    """The router's scores of each token, `[tokens, experts]`."""
    name, op = f"{layer.name}.router", graph.op
    weight = graph.float_weight(f"{name}.weight", np.ascontiguousarray(layer.router.T), dtype)
    flat = op("Reshape", [x, graph.constant([-1, layer.checkpoint.config.hidden_size])], f"{name}.tokens")
    return op("MatMul", [flat, weight], name)


def _stacked(
    graph: GraphBuilder, layer: SparseLayer, which: str, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes, scales and zero points of one of the two matrices.

    Codes go to the disk expert by expert.
    """
    parts = layer.parts[:-1] if which == "fc1" else layer.parts[-1:]
    scales: list[NDArray] = []
    zeros: list[NDArray] = []

    def codes() -> Iterator[NDArray]:
        for tensors in layer.read(*parts):
            assert all(isinstance(tensor, QuantizedTensor) for tensor in tensors)
            found = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
            bits = found[0].scheme.num_bits
            scales.append(_woven([tensor.scales.astype(dtype.numpy()) for tensor in found]))
            if found[0].zeros is not None:
                zeros.append(pack.pack_bytes(_woven([t.zeros for t in found if t.zeros is not None]), bits))
            yield pack.pack_bytes(_woven([tensor.codes for tensor in found]), bits)

    config, scheme, name = layer.checkpoint.config, layer.schemes[parts[0]], f"{layer.name}.{which}"
    assert scheme is not None
    rows = 2 * config.moe_intermediate_size if which == "fc1" else config.hidden_size
    width = config.hidden_size if which == "fc1" else config.moe_intermediate_size
    shape = (config.num_experts, rows, width * scheme.num_bits // 8)
    stored = graph.weight_parts(f"{name}.codes", codes(), ir.DataType.UINT8, shape)
    # One scale per channel: the kernel knows it by two axes.
    channel = scheme.strategy == "channel"
    all_scales = np.stack(scales)[..., 0] if channel else np.stack(scales)
    packed = None
    if zeros:
        flat = np.stack(zeros)
        if channel:
            flat = pack.pack_bytes(flat[..., 0] & np.uint8(scheme.max_code), scheme.num_bits)
        packed = graph.weight(f"{name}.zeros", flat)
    return stored, graph.weight(f"{name}.scales", all_scales), packed


def _woven(parts: list[NDArray]) -> NDArray:
    """Rows of the matrices by turns."""
    return np.stack(parts, 1).reshape(-1, parts[0].shape[1])
