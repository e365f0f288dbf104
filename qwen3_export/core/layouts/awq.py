"""The AWQ layout of AutoAWQ's `gemm` kernels; 4 bits, always with zero points, transposed.

NAME.qweight  int32 [in, out / 8]       eight outputs per word, in the order 0 2 4 6 1 3 5 7
NAME.qzeros   int32 [groups, out / 8]   the same order
NAME.scales   fp16  [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.architecture import ROUTER, is_expert
from qwen3_export.core.layouts import NEEDS_ORIGINAL, Schemes, Shapes, Stored, grouped_scheme, is_unquantized
from qwen3_export.core.layouts.gptq import foreign_floats, uniform
from qwen3_export.core.pack import pack_int32, unpack_int32
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec
from qwen3_export.errors import CheckpointError, RecipeError

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_PER_WORD = 8


def supports(scheme: QuantScheme) -> str | None:
    """4 bits in groups, with scales that fp16 holds."""
    if (scheme.type, scheme.num_bits, scheme.strategy) != ("int", 4, "group"):
        return "the AWQ kernels take 4-bit groups only"
    return "its scales are fp16: use scale_dtype bf16 or fp16" if scheme.scale_dtype == "fp32" else None


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme, stored: Stored | None = None) -> dict[str, Spec]:
    """See the package docstring."""
    (out_features, in_features), groups = shape, scheme.num_groups(shape[1])
    if out_features % _PER_WORD:
        raise RecipeError(f"{module}: {out_features} outputs cannot be packed by {_PER_WORD} in the awq layout")
    found: dict[str, Spec] = {
        f"{module}.qweight": (np.dtype("<i4"), (in_features, out_features // _PER_WORD)),
        f"{module}.qzeros": (np.dtype("<i4"), (groups, out_features // _PER_WORD)),
        f"{module}.scales": (np.dtype("<f2"), (groups, out_features)),
    }
    return {**found, **foreign_floats(stored, module, found)} if stored else found


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring; a symmetric tensor gets its implicit zero point written out."""
    zeros = tensor.zeros
    if zeros is None:
        zeros = np.full(tensor.scales.shape, tensor.scheme.midpoint, np.uint8)
    return {
        f"{tensor.name}.qweight": pack_int32(_interleave(tensor.codes.T), 4),
        f"{tensor.name}.qzeros": pack_int32(_interleave(zeros.T), 4),
        f"{tensor.name}.scales": np.ascontiguousarray(tensor.scales.astype("<f2").T),
    }


def unpack(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    codes = _straighten(unpack_int32(stored.read(f"{module}.qweight"), 4, shape[0]))
    zeros = None if scheme.symmetric else zero_points(stored, module, shape, scheme)
    scales = np.ascontiguousarray(stored.read(f"{module}.scales").T).astype(SCALE_TYPES[scheme.scale_dtype])
    return QuantizedTensor(module, shape, scheme, codes, scales, zeros)


def zero_points(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> NDArray[np.uint8]:
    """The stored zero points `[out, groups]`."""
    return _straighten(unpack_int32(stored.read(f"{module}.qzeros"), scheme.num_bits, shape[0]))


def _interleave(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    words = rows.reshape(rows.shape[0], -1, _PER_WORD)[..., _ORDER]
    return words.reshape(rows.shape)


def _straighten(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Inverse of `_interleave`, transposed back to `[out, …]`."""
    words = rows.reshape(rows.shape[0], -1, _PER_WORD)[..., np.argsort(_ORDER)]
    return np.ascontiguousarray(words.reshape(rows.shape).T)


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """AWQ's `quantization_config`; it has one scheme for all linears."""
    scheme = uniform(schemes, linears, "awq")
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", *([ROUTER] if any(map(is_expert, linears)) else [])],
    }


def read_schemes(where: str, stored: Stored, linears: Shapes) -> Schemes:
    """Scheme of every linear that this layout's `quantization_config` quantizes; CheckpointError if it can't say."""
    config, parts = stored.config, ("qweight", "qzeros", "scales")
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(f"{where}: AWQ version {version!r}; only gemm can be read", NEEDS_ORIGINAL)
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits != 4:
        raise CheckpointError(f"{where}: AWQ with bits: {bits!r}; 4 was expected", NEEDS_ORIGINAL)
    quantized = [module for module in linears if not is_unquantized(stored, module, parts)]
    return {module: grouped_scheme(bits, size, stored, module) for module in quantized}
