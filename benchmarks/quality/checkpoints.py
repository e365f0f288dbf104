"""The checkpoints that are quantized, made once in the cache folder where needed.

reference-model   the trained 8M model of this project
outliers          the same function with outlier channels, as large models have them
small             another shape, distilled from it: wider, shallower, no shared key/value heads, own head
moe               eight experts of which two work, distilled from it
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.quality.sidecars import copy_sidecars
from benchmarks.quality.venvs import cache_folder
from qwen3_export.core.source import locate

MAKERS = ("reference-model", "outliers", "small", "moe")
# Number of outlier channels per tensor, and the powers of two that they are scaled by.
NORM, INNER, VALUE = (4, (3, 4, 5)), (8, (2, 3, 4)), (4, (2, 3))


def make(name: str) -> Path:
    """The folder of a named checkpoint, made first when it is missing."""
    if name == "reference-model":
        return locate(name)
    folder = cache_folder() / "checkpoints" / name
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if name == "outliers":
            make_outliers(partial)
        else:
            # Imported here, so that other runs do not load torch.
            from benchmarks.quality import distil

            distil.make(name, partial)
        partial.rename(folder)
    return folder


def make_outliers(folder: Path) -> None:
    """Scale channels up and their readers down by powers of two: same logits.

    Powers of two are exact in bf16.
    """
    source = locate("reference-model")
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    random = np.random.default_rng(0)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        scale(tensors, f"{block}.input_layernorm", [f"{attention}.{n}_proj" for n in "qkv"], factors(random, 256, NORM))
        readers = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        scale(tensors, f"{block}.post_attention_layernorm", readers, factors(random, 256, NORM))
        inner = factors(random, config["intermediate_size"], INNER)
        scale(tensors, f"{mlp}.up_proj", [f"{mlp}.down_proj"], inner)
        heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
        value = np.stack([factors(random, config["head_dim"], VALUE) for _ in range(shared)])
        rows(tensors, f"{attention}.v_proj", value.reshape(-1))
        columns(tensors, f"{attention}.o_proj", np.repeat(value, heads // shared, axis=0).reshape(-1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder / "config.json")
    copy_sidecars(folder)


def factors(random: np.random.Generator, size: int, kind: tuple[int, tuple[int, ...]]) -> np.ndarray:
    """Ones, with a few powers of two at random places."""
    count, exponents = kind
    result = np.ones(size, np.float32)
    result[random.choice(size, count, replace=False)] = 2.0 ** random.choice(exponents, count)
    return result


def scale(tensors: dict[str, np.ndarray], writer: str, readers: list[str], by: np.ndarray) -> None:
    """A writer's outputs times `by`, and every reader's inputs divided by it."""
    rows(tensors, writer, by)
    for reader in readers:
        columns(tensors, reader, by)


def rows(tensors: dict[str, np.ndarray], name: str, by: np.ndarray) -> None:
    weight = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = exactly(weight, weight.astype(np.float32) * (by[:, None] if weight.ndim == 2 else by))


def columns(tensors: dict[str, np.ndarray], name: str, by: np.ndarray) -> None:
    weight = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = exactly(weight, weight.astype(np.float32) / by)


def exactly(like: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values in the dtype of `like`, which must hold them exactly."""
    result = values.astype(like.dtype)
    assert (result.astype(np.float32) == values).all()
    return result
