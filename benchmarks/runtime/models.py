"""A random model of Qwen3-0.6B's shape and its artifacts: ours, onnxruntime-genai's builder's, llama.cpp's.

Speed does not depend on the weights. The tokenizer is the reference model's; `layers` and `vocabulary` make the model
smaller.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.quality.sidecars import copy_sidecars
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, parse_config
from qwen3_export.core.recipe import Recipe, Rule, load_recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.prove.cache import cache_cost, cache_scales
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize

_W8 = QuantScheme(8, group_size=128)


def _recipe(name: str) -> Recipe:
    """A shipped recipe or a variant, with rounding to nearest as its method."""
    changes = {"edge-w4-head8": ("edge-w4", _W8), "int8-dynamic": ("int8-dynamic", _W8)}
    base, outer = changes.get(name, (name, None))
    rules = load_recipe(base).rules
    if outer is not None:
        rules = (Rule(EMBEDDING, outer), Rule(HEAD, outer), *rules)
    return Recipe(name, "rtn", tuple(Rule(rule.match, _plain(rule.scheme)) for rule in rules))


def _plain(scheme: QuantScheme | None) -> QuantScheme | None:
    return None if scheme is None else replace(scheme, signed_scales=False)


def checkpoint(folder: Path, layers: int, vocabulary: int) -> Path:
    """The 16-bit model, made when missing."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
        "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    random = np.random.default_rng(0)
    shapes = parse_config(config, "benchmark").tensor_shapes()
    tensors = (
        (name, (random.standard_normal(shape, np.float32) * 0.02 + (len(shape) == 1)).astype(ml_dtypes.bfloat16))
        for name, shape in shapes.items()
    )
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    copy_sidecars(folder)
    return folder


def ours(base: Path, source: Path, kind: str) -> Path:
    """Our ONNX folder of a recipe; ` kv-int8` or ` kv-int4` quantizes its cache."""
    name, _, cache = kind.partition(" kv-")
    output = base / f"ours-{kind.replace(' ', '-')}"
    if not output.is_dir():
        quantized = open_checkpoint(rounded(base, source, name))
        export_onnx(quantized, output, kv_cache=cache or "fp32", study_cache=(cache_scales, cache_cost))
    return output


def rounded(base: Path, source: Path, name: str) -> Path:
    """A quantized folder of the model, rounded to a recipe's schemes."""
    output = base / f"quantized-{name}"
    if not output.is_dir():
        quantize(open_checkpoint(source), _recipe(name), output, QuantizeSettings())
    return output


def builder(base: Path, source: Path, kind: str) -> Path:
    """The folder of onnxruntime-genai's builder, with its defaults for a CPU."""
    output = base / f"builder-{kind}"
    if not (output / "genai_config.json").is_file():
        module = "onnxruntime_genai.models.builder"
        options = ["-i", source, "-o", output, "-p", kind, "-e", "cpu", "-c", base / "cache"]
        subprocess.run([sys.executable, "-m", module, *map(str, options)], check=True, capture_output=True)
    return output


def llama(base: Path, source: Path, kind: str) -> Path:
    """A GGUF file: q4_0 has edge-w4's codes, other types are llama.cpp's mixes, rounded."""
    output = base / f"{kind}.gguf"
    if not output.is_file():
        codes = kind == "q4_0"
        export_gguf(
            open_checkpoint(rounded(base, source, "edge-w4") if codes else source), output, None if codes else kind
        )
    return output
