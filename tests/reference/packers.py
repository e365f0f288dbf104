"""Writes folders in the layouts of AutoGPTQ, GPTQModel, AutoAWQ and official FP8 releases.

Nothing here imports `qwen3_export.core.pack` or `core.layouts`. Each function writes a folder of random codes with
plain loops, and the weights in fp32 that the layout's own tool computes from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.qwen3 import parse_config
from tests.conftest import random_tensors, tiny_config, write_checkpoint

# AutoAWQ puts outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight into one word, the first into the lowest bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Weights = dict[str, NDArray[np.float32]]


@dataclass
class Folder:
    """A written folder: its tensors, the packed values, and the weights in fp32."""

    path: Path
    tensors: dict[str, NDArray]
    codes: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    zeros: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)

    def write(self, quantization: Mapping[str, Any] | None, config: Mapping[str, Any] | None = None) -> Folder:
        values = {**(config or tiny_config())}
        if quantization is not None:
            values["quantization_config"] = quantization
        write_checkpoint(self.path, values, self.tensors)
        return self

    def dense(self, config: Mapping[str, Any] | None = None) -> Path:
        """The same model as a plain fp32 folder."""
        kept = {n: a for n, a in self.tensors.items() if n.endswith(("norm.weight", "embed_tokens.weight"))}
        every = {**random_tensors(parse_config(dict(config or tiny_config()), "test")), **kept}
        every.update({f"{name}.weight": weight for name, weight in self.weights.items()})
        plain = {name: array.astype(np.float32) for name, array in every.items()}
        return write_checkpoint(self.path.with_name(f"{self.path.name} dense"), dict(config or tiny_config()), plain)


def pack_down(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Pack `[n, m]` into int32 `[n · bits / 32, m]`, lowest bits first."""
    words = np.zeros((len(values) * bits // 32 + 1, values.shape[1]), np.uint64)
    for row, value in enumerate(values.astype(np.uint64)):
        word, offset = divmod(row * bits, 32)
        words[word] |= (value << np.uint64(offset)) & np.uint64(0xFFFFFFFF)
        words[word + 1] |= value >> np.uint64(32 - offset)
    return words[:-1].astype(np.uint32).view(np.int32)


def pack_awq(rows: NDArray[np.uint8]) -> NDArray[np.int32]:
    """`[m, out]` → int32 `[m, out / 8]` in AutoAWQ's order."""
    words = np.zeros((len(rows), rows.shape[1] // 8), np.uint32)
    for place, output in enumerate(AWQ_ORDER):
        words |= rows[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def _start(path: Path, config: Mapping[str, Any] | None) -> tuple[Folder, dict[str, tuple[int, int]]]:
    parsed = parse_config(dict(config or tiny_config()), "test")
    linears = parsed.all_linears()
    plain = {n: a for n, a in random_tensors(parsed).items() if n.removesuffix(".weight") not in linears}
    return Folder(path, plain), linears


def gptq(
    path: Path,
    bits: int = 4,
    group: int = 32,
    *,
    v2: bool = False,
    order: bool = False,
    index: bool = True,
    midpoint: bool = False,
    borrow: bool = False,
    scales: Any = np.float16,
    config: Mapping[str, Any] | None = None,
    **said: Any,
) -> Folder:
    """A GPTQ folder; `order` shuffles the groups.

    `borrow` subtracts 1 from the zero points in whole words, as GPTQModel does, so that a 0 borrows from its neighbour.
    """
    random, (folder, linears) = np.random.default_rng(0), _start(path, config)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    for name, (out, inputs) in linears.items():
        size = inputs if group == -1 else group
        codes = random.integers(0, 2**bits, (out, inputs), np.uint8)
        zeros = random.integers(0, 2**bits, (out, inputs // size), np.uint8)
        if midpoint:
            zeros[:] = 2 ** (bits - 1)
        scale = (random.uniform(0.5, 1.5, zeros.shape) * 0.4 / 2**bits).astype(scales)
        of_input = np.arange(inputs, dtype=np.int32) // size
        if order:
            of_input = random.permutation(of_input)
        qzeros = pack_down(zeros if v2 or borrow else (zeros - np.uint8(1)) & np.uint8(2**bits - 1), bits)
        if borrow:
            qzeros = (qzeros.view(np.uint32) - ones).view(np.int32)
        folder.tensors[f"{name}.qweight"] = pack_down(codes.T, bits)
        folder.tensors[f"{name}.qzeros"] = np.ascontiguousarray(qzeros.T)
        folder.tensors[f"{name}.scales"] = np.ascontiguousarray(scale.T)
        if index:
            folder.tensors[f"{name}.g_idx"] = of_input
        folder.codes[name], folder.zeros[name] = codes, zeros
        each = zeros.astype(np.float32)[:, of_input]
        folder.weights[name] = (codes - each) * scale.astype(np.float32)[:, of_input]
    values = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": midpoint, "desc_act": order}
    return folder.write({**values, "checkpoint_format": "gptq_v2" if v2 else "gptq", **said}, config)


def awq(
    path: Path, group: int = 32, *, midpoint: bool = False, config: Mapping[str, Any] | None = None, **said: Any
) -> Folder:
    """An AutoAWQ folder of version gemm."""
    random, (folder, linears) = np.random.default_rng(1), _start(path, config)
    for name, (out, inputs) in linears.items():
        size = inputs if group == -1 else group
        codes = random.integers(0, 16, (out, inputs), np.uint8)
        zeros = random.integers(0, 16, (out, inputs // size), np.uint8)
        if midpoint:
            zeros[:] = 8
        scale = (random.uniform(0.5, 1.5, zeros.shape) * 0.025).astype(np.float16)
        folder.tensors[f"{name}.qweight"] = pack_awq(np.ascontiguousarray(codes.T))
        folder.tensors[f"{name}.qzeros"] = pack_awq(np.ascontiguousarray(zeros.T))
        folder.tensors[f"{name}.scales"] = np.ascontiguousarray(scale.T)
        folder.codes[name], folder.zeros[name] = codes, zeros
        repeat = [np.repeat(a.astype(np.float32), size, 1) for a in (zeros, scale)]
        folder.weights[name] = (codes - repeat[0]) * repeat[1]
    values = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True}
    return folder.write({**values, "modules_to_not_convert": None, **said}, config)


def fp8(
    path: Path, config: Mapping[str, Any], *, scales: Any = ml_dtypes.bfloat16, plain: str = "none", **said: Any
) -> Folder:
    """A folder in the official FP8 layout; linears named `plain` stay in 16 bits."""
    random, (folder, linears) = np.random.default_rng(2), _start(path, config)
    for name, (out, inputs) in linears.items():
        if plain in name:
            weight = random.normal(0, 0.1, (out, inputs)).astype(ml_dtypes.bfloat16)
            folder.tensors[f"{name}.weight"], folder.weights[name] = weight, weight.astype(np.float32)
            continue
        codes = random.normal(0, 100, (out, inputs)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        scale = random.uniform(0.5e-3, 1.5e-3, (-(-out // 128), -(-inputs // 128))).astype(scales)
        folder.tensors[f"{name}.weight"], folder.tensors[f"{name}.weight_scale_inv"] = codes, scale
        each = np.repeat(np.repeat(scale.astype(np.float32), 128, 0), 128, 1)[:out, :inputs]
        folder.weights[name] = codes.astype(np.float32) * each
    values = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    skipped = ["lm_head", *(name for name in linears if plain in name)]
    return folder.write({**values, "modules_to_not_convert": skipped, **said}, config)
