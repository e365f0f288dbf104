"""The mix rule against llama.cpp's own, for every file type: no difference.

Nine Qwen3 shapes are compared without an importance matrix, four small models with one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.gguf_header import read_gguf_header
from qwen3_export.core.gguf_types import FILE_TYPES, Overrides, gguf_name, module_types
from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.errors import InputError
from qwen3_export.ship.gguf import export_gguf
from tests.artifact.support import tiny_with_tokenizer
from tests.conftest import tiny_config, tiny_moe_config
from tests.reference.llama_quantize import Description, computed_types, quantize


def shape(hidden: int, width: int, layers: int, heads: int, kv_heads: int, tied: bool = False, **more: Any) -> Any:
    return {
        "model_type": "qwen3_moe" if "num_experts" in more else "qwen3",
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
        **more,
    }


def experts(count: int, width: int) -> dict[str, Any]:
    return {"num_experts": count, "num_experts_per_tok": 2, "moe_intermediate_size": width, "norm_topk_prob": True}


# The releases, of the largest one fewer experts (their number matters at eight alone), eight experts, odd widths.
SHAPES = {
    "0.6B": shape(1024, 3072, 28, 16, 8, True),
    "1.7B": shape(2048, 6144, 28, 16, 8, True),
    "4B": shape(2560, 9728, 36, 32, 8, True),
    "8B": shape(4096, 12288, 36, 32, 8),
    "14B": shape(5120, 17408, 40, 40, 8),
    "32B": shape(5120, 25600, 64, 64, 8),
    "30B-A3B": shape(2048, 6144, 48, 32, 4, **experts(16, 768)),
    "eight experts": shape(2048, 6144, 9, 32, 4, **experts(8, 768)),
    "blocks of 32": shape(1056, 3104, 17, 16, 8),
}


def tensors(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """`{GGUF name: shape, innermost first}` of the matrices, in the file's order."""
    found: dict[str, tuple[int, ...]] = {}
    for module, (rows, inputs) in config.all_matrices().items():
        name = f"{gguf_name(module)}.weight"
        found[name] = (inputs, rows, config.num_experts) if "_exps" in name else (inputs, rows)
    return found


@pytest.mark.parametrize("size", SHAPES)
def test_types_are_llama_cpps(size: str) -> None:
    config = parse_config(SHAPES[size], "test")
    described = Description(
        b"qwen3moe" if config.num_experts else b"qwen3", config.hidden_size, config.intermediate_size,
        config.num_layers, config.num_heads, config.num_kv_heads, config.num_experts, config.head_dim, config.head_dim,
    )  # fmt: skip
    compared = 0
    for name, kind in FILE_TYPES.items():
        if name == "mxfp4":
            continue  # llama.cpp has no such mix
        wanted = computed_types(described, tensors(config), kind.number)
        types = module_types(config, name)
        assert {f"{gguf_name(module)}.weight": found for module, found in types.items()} == wanted, name
        compared += len(wanted)
    assert compared > 18 * config.num_layers * 7


# Eight layers, of which the first is the eighth that a matrix decides on.
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "tie_word_embeddings": True}
WEIGHED = {
    "dense": tiny_config(**SMALL),
    "four queries to a key": tiny_config(**SMALL, num_key_value_heads=1),
    "four experts": tiny_moe_config(**SMALL, moe_intermediate_size=256, num_experts=4),
    "eight experts": tiny_moe_config(**SMALL, moe_intermediate_size=256, num_experts=8),
}
# File types in whose mix llama.cpp asks for a matrix.
CHANGED = {"q4_0", "q5_0", "iq4_nl", "iq4_xs"}


@pytest.mark.parametrize("kind", WEIGHED)
def test_types_with_a_matrix_are_llama_cpps(tmp_path: Path, reference_folder: Path, kind: str) -> None:
    """Whole files, since `llama_quant_compute_types` is not told of a matrix; every file type on the dense one."""
    checkpoint = open_checkpoint(tiny_with_tokenizer(tmp_path / "tiny", reference_folder, WEIGHED[kind]))
    config = checkpoint.config
    export_gguf(checkpoint, tmp_path / "bf16.gguf", "bf16")
    linears = {name: sizes for name, sizes in tensors(config).items() if name.startswith("blk.")}
    means = {name: np.ones((*sizes[2:], sizes[0]), np.float32) for name, sizes in linears.items()}
    changed = set()
    for name in FILE_TYPES.keys() - {"mxfp4"} if kind == "dense" else CHANGED:
        quantize(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", FILE_TYPES[name].number, means)
        theirs = {tensor.name: tensor.type for tensor in read_gguf_header(tmp_path / "theirs.gguf").tensors}
        types, plain = (module_types(config, name, weighed) for weighed in (True, False))
        assert types == {module: theirs[f"{gguf_name(module)}.weight"] for module in types}, name
        changed |= {name} if types != plain else set()
    assert changed == CHANGED


def test_experts_share_their_stacks_type() -> None:
    types = module_types(parse_config(SHAPES["30B-A3B"], "test"), "q4_k_m")
    for layer in range(48):
        found = {types[f"model.layers.{layer}.mlp.experts.{expert}.down_proj"] for expert in range(16)}
        assert len(found) == 1


def test_what_the_user_asks_for_comes_first() -> None:
    config = parse_config(SHAPES["0.6B"], "test")
    chosen = Overrides((("attn_v", "q8_0"), (r"blk\.[01]\..*", "q5_k"), ("attn", "q2_k")), output="q5_0")
    types = module_types(config, "q4_k_m", overrides=chosen)
    assert types["model.layers.0.self_attn.v_proj"] == "q8_0"
    assert types["model.layers.1.mlp.up_proj"] == types["model.layers.0.self_attn.q_proj"] == "q5_k"
    assert types["model.layers.2.self_attn.q_proj"] == "q2_k"
    assert types["model.layers.2.mlp.up_proj"] == "q4_k"
    assert types["model.embed_tokens"] == "q5_0"
    assert module_types(config, "q4_k_m", overrides=Overrides(token_embedding="q8_0"))["model.embed_tokens"] == "q8_0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"patterns": (("attn", "q4_k_m"),)}, "--tensor-type attn=q4_k_m: one of f32, f16, bf16"),
        ({"patterns": (("(", "q4_k"),)}, "not a regular expression"),
        ({"token_embedding": "q9"}, "--token-embedding-type q9"),
    ],
)
def test_unknown_types_and_patterns(given: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        Overrides(**given)
    assert message in str(error.value)


def test_a_role_whose_row_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"token_embd.weight: its 1056 inputs are not divisible by 256"):
        module_types(parse_config(SHAPES["blocks of 32"], "test"), "q4_0", overrides=Overrides(token_embedding="q6_k"))
