"""What recipes that solve make of a small fixed model: codes, errors and hashes, for `test_solved_bytes`.

A solve is chaotic. A sum that is one bit off turns over a code that lies between two, later columns compensate, and
soon half of the codes are others, equally good. So hashes hold for one kind of arithmetic alone (`kind`). For all other
kinds there are codes of linears that no earlier rounding reaches, and the error of every linear.

`python -m tests.reference.solved_bytes` stores them anew: for this processor, and for those that it can stand in for.
Weights come from files and a hash function, not from a library's random numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest
import torch
from llvmlite import binding as llvm

from qwen3_export import quantize
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.source import open_source
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.model.workers import fast_matmul
from tests.conftest import copy_tokenizer, tiny_moe_config, write_checkpoint

STORED, CODES = (Path(__file__).with_suffix(suffix) for suffix in (".json", ".npz"))
# By recipe, the family of its model and linears of the first block whose codes are the same on every processor. With
# noise shaping there are none: it ties output rows together, so that one code turned over changes the whole matrix.
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gptq-plain-w4a16-g128": ("dense", QKV),
    "gptq-w4a16-g128": ("dense", QKV),
    "gptq-max-w4a16-g128": ("dense", ()),
    "awq-w4a16-g128": ("dense", (*QKV, "self_attn.o_proj", "mlp.down_proj")),
    "gguf-q4_k_m": ("dense", ()),
    "edge-w4": ("dense", ()),
    "gptq-w4a16-g32": ("moe", QKV),
}
# Of each matrix every nth row is stored, so that there are this many.
ROWS = 64
# Two blocks for hashes; one for codes and errors, which later blocks would only scatter.
HASHED_BLOCKS, NEAR_BLOCKS = 2, 1
# Channels of the blocks' inputs that are made large, without which no fold pays.
OUTLIERS, LARGER = (5, 77, 200), 16
# A recipe of two seconds, for processes whose libraries are told to compute as on another processor.
QUICK = ("gptq-w4a16-g128",)
# Settings that make libraries compute as on another processor, by what samples are multiplied in there.
FORCED: dict[str, dict[str, str]] = {
    "integers": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt,+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "fp32": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "NUMBA_CPU_NAME": "generic",
        "OPENBLAS_CORETYPE": "Prescott",
    },
}
_IDENTITY = ("vendor_id", "cpu family", "model", "stepping", "cache size", "CPU implementer", "CPU part", "CPU variant")
_SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA"),
    *("DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "NUMBA_OPT", "NUMBA_ENABLE_AVX", "NUMBA_LOOP_VECTORIZE"),
    *("NUMBA_SLP_VECTORIZE", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "GLIBC_TUNABLES"),
)


def kind() -> dict[str, Any]:
    """Everything that may decide the last bit of a sum: equal kinds give equal bytes.

    Libraries choose their loops by the processor's maker, model, features and caches, so all of these belong to it.
    """
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    known = {key.strip(): value.strip() for key, value in lines}
    features = numba.config.CPU_FEATURES
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    built = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    libraries = [line for line in built if "Library Version" in line or "MKL-DNN" in line]
    return {
        "processor": [platform.machine(), *(f"{key} {known[key]}" for key in _IDENTITY if key in known)],
        "features": ",".join(sorted(part for part in features.split(",") if part.startswith("+"))),
        "products": fast_matmul(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "target": [numba.config.CPU_NAME or llvm.get_host_cpu_name(), f"SVML {numba.config.USING_SVML}"],
        "versions": [f"torch {torch.__version__}", f"numba {numba.__version__}", f"numpy {np.__version__}"],
        "libraries": [*libraries, f"LLVM {llvm.llvm_version_info}", " ".join(platform.libc_ver())],
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


@contextmanager
def multiplied_in(products: str) -> Iterator[None]:
    """Multiply calibration samples in `bf16`, `integers` or `fp32`, whatever is fastest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3_export.model.workers.has_bf16", lambda: products == "bf16")
        patch.setattr("qwen3_export.model.workers.has_fast_int_matmul", lambda: products == "integers")
        yield


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of mean 0 and deviation 1, nearly normal, from the hash of a name: the same everywhere."""
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * int(np.prod(shape))), np.uint8)
    return (drawn.reshape(*shape, 4).astype(np.float32).sum(-1) - 510) / 148


def write_model(folder: Path, family: str, blocks: int) -> Path:
    """The first blocks of the reference model with outlier channels, or a mixture of four experts."""
    source, tensors = open_source("reference-model"), {}
    if family == "dense":
        values = json.loads((source.folder / "config.json").read_text())
        values.update(num_hidden_layers=blocks, layer_types=values["layer_types"][:blocks])
    else:
        values = tiny_moe_config(vocab_size=8192, num_experts=4, moe_intermediate_size=64, intermediate_size=128)
        values.update(num_hidden_layers=blocks)
    for name, shape in parse_config(values, "test").tensor_shapes().items():
        if family == "moe":
            made = 1 + numbers(name, shape) / 4 if len(shape) == 1 else numbers(name, shape) / 8
            tensors[name] = made.astype(ml_dtypes.bfloat16)
            continue
        tensors[name] = np.array(source.read(name))
        if "layernorm" in name:
            tensors[name][list(OUTLIERS)] *= LARGER
    write_checkpoint(folder, values, tensors)
    return copy_tokenizer(source.folder, folder)


def solve(recipe: str, folder: Path, threads: int, blocks: int) -> Path:
    """Quantize the recipe's model, with so few samples that it takes seconds; the output folder."""
    model = write_model(folder / "model", RECIPES[recipe][0], blocks)
    quantize(model, recipe, folder / "out", samples=16, sequence_length=64, threads=threads)
    return folder / "out"


def sha256(folder: Path) -> str:
    """One hash of all shards, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def errors(folder: Path) -> dict[str, float]:
    """Relative error of every quantized matrix, weighted by its inputs."""
    tensors = json.loads((folder / "qwen3-export.json").read_text())["tensors"]
    return {name: float(f"{values['error']:.4g}") for name, values in tensors.items()}


def codes(recipe: str, folder: Path) -> dict[str, np.ndarray]:
    """`{recipe/linear/codes or /scales: array}` of some rows; two 4-bit codes in a byte."""
    checkpoint, found = open_checkpoint(folder), {}
    for name in RECIPES[recipe][1]:
        tensor = checkpoint.linear(f"model.layers.0.{name}")
        assert isinstance(tensor, QuantizedTensor)
        some = slice(None, None, max(1, tensor.shape[0] // ROWS))
        chosen = tensor.codes[some]
        found[f"{recipe}/{name}/codes"] = chosen[:, ::2] | chosen[:, 1::2] << 4
        found[f"{recipe}/{name}/scales"] = tensor.scales32[some]
    return found


def hashes(recipes: Iterable[str]) -> dict[str, str]:
    """Hashes of the recipes' outputs, here and now."""
    found = {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as scratch:
            found[recipe] = sha256(solve(recipe, Path(scratch), threads=1, blocks=HASHED_BLOCKS))
    return found


def near() -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """What is nearly the same on every processor: errors by recipe, and codes."""
    found_errors, found_codes = {}, {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as scratch, multiplied_in("fp32"):
            folder = solve(recipe, Path(scratch), threads=1, blocks=NEAR_BLOCKS)
            found_errors[recipe] = errors(folder)
            found_codes.update(codes(recipe, folder))
    return found_errors, found_codes


def forced(products: str) -> dict[str, Any]:
    """Kind and hashes in a process whose libraries are told to compute as on another processor."""
    command = [sys.executable, "-m", "tests.reference.solved_bytes", products]
    environment = {**os.environ, **FORCED[products]}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True, timeout=300)
    return json.loads(done.stdout)


def store() -> None:
    """Write both files anew; kinds of other machines stay if nothing changed for those of this one."""
    found = [{"kind": kind(), "hashes": hashes(RECIPES)}]
    if torch.cpu.get_capabilities().get("avx2"):
        found += [forced(products) for products in FORCED]
    before = json.loads(STORED.read_text())["kinds"] if STORED.exists() else []
    here = [one["kind"] for one in found]
    if all(one in found for one in before if one["kind"] in here):
        found += [one for one in before if one["kind"] not in here]
    found_errors, found_codes = near()
    STORED.write_text(json.dumps({"errors": found_errors, "kinds": found}, indent=1) + "\n")
    np.savez_compressed(CODES, **found_codes)


if __name__ == "__main__":
    if sys.argv[1:]:
        with multiplied_in(sys.argv[1]):
            print(json.dumps({"kind": kind(), "hashes": hashes(QUICK)}))
    else:
        store()
