"""Slices of large Qwen3 models: exact widths and vocabulary, few layers, random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.shards import INDEX
from qwen3_export.core.source import locate
from qwen3_export.core.tensorfile import TensorFileWriter

_COMMON = {
    "vocab_size": 151936,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 8187,
    "bos_token_id": 8185,
}
# Size of the pool of random numbers that weights are cut from: a prime, so that rows begin at different places.
_POOL = 16_777_259
_BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Shape:
    """A published model: `config` are its widths, `layers` its depth."""

    layers: int
    config: dict[str, Any]


def _dense(layers: int, hidden: int, inner: int, heads: int) -> Shape:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 8}
    return Shape(layers, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_COMMON, **sizes})


def _sparse(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, experts: int) -> Shape:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return Shape(layers, {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_COMMON, **sizes})


MODELS = {
    "8B": _dense(36, 4096, 12288, 32),
    "14B": _dense(40, 5120, 17408, 40),
    "32B": _dense(64, 5120, 25600, 64),
    "30B-A3B": _sparse(48, 2048, 768, 32, 4, 128),
    "235B-A22B": _sparse(94, 4096, 1536, 64, 4, 128),
    "Coder-480B-A35B": _sparse(62, 6144, 2560, 96, 8, 160),
}


def make_slice(folder: Path, name: str, layers: int, **changes: Any) -> Path:
    """A checkpoint of `layers` layers, one shard each; `changes` narrow it."""
    raw = {**MODELS[name].config, "num_hidden_layers": layers, **changes}
    config, where = parse_config(raw, name), dict[str, str]()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    random = np.random.default_rng(0)
    pool = (0.02 * random.standard_normal(_POOL, np.float32)).astype(_BF16)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, shape in config.tensor_shapes().items():
        layer = tensor.split(".")[2] if tensor.startswith("model.layers.") else "outer"
        shards.setdefault(layer, {})[tensor] = shape
    for layer, shapes in shards.items():
        file = f"model-{layer}.safetensors"
        where.update(dict.fromkeys(shapes, file))
        with TensorFileWriter(folder / file, {tensor: (_BF16, shape) for tensor, shape in shapes.items()}) as writer:
            for tensor, shape in shapes.items():
                with writer.pieces(tensor) as write:
                    for piece in _pieces(pool, random, shape):
                        write(piece)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for sidecar in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(locate("reference-model") / sidecar, folder / sidecar)
    return folder


def _pieces(pool: NDArray, random: np.random.Generator, shape: tuple[int, ...]) -> Iterator[NDArray]:
    """Norms of one; matrices in pieces from different places of the pool."""
    if len(shape) == 1:
        yield np.ones(shape, np.float32).astype(_BF16)
        return
    at_once = max(1, (_POOL // 2) // shape[1])
    for begin in range(0, shape[0], at_once):
        count = min(at_once, shape[0] - begin)
        place = int(random.integers(0, _POOL - count * shape[1]))
        yield pool[place : place + count * shape[1]].reshape(count, shape[1])
