"""The GPTQ layout of AutoGPTQ and its successor GPTQModel; everything is transposed to `[in, out]`.

NAME.qweight  int32 [in * bits / 32, out]       packed along inputs, low bits first
NAME.qzeros   int32 [groups, out * bits / 32]   symmetric: zero - 1 (format `gptq`); else `gptq_v2`
NAME.scales   fp16  [groups, out]
NAME.g_idx    int32 [in]                        group of each input; ours is always i // group_size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.pack import pack_int32, unpack_int32
from qwen3_export.core.recipe import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec
from qwen3_export.errors import RecipeError


def supports(scheme: QuantScheme) -> str | None:
    """Scales are fp16 here, which holds bf16 ones of our range exactly."""
    return "its scales are fp16: use scale_dtype bf16 or fp16" if scheme.scale_dtype == "fp32" else None


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme) -> dict[str, Spec]:
    """See the package docstring."""
    (out_features, in_features), groups = shape, scheme.num_groups(shape[1])
    per_word = 32 // scheme.num_bits
    if in_features % per_word or out_features % per_word:
        raise RecipeError(f"{module}: {list(shape)} cannot be packed by {per_word} in the gptq layout")
    return {
        f"{module}.qweight": (np.dtype("<i4"), (in_features // per_word, out_features)),
        f"{module}.qzeros": (np.dtype("<i4"), (groups, out_features // per_word)),
        f"{module}.scales": (np.dtype("<f2"), (groups, out_features)),
        f"{module}.g_idx": (np.dtype("<i4"), (in_features,)),
    }


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring."""
    scheme, in_features = tensor.scheme, tensor.shape[1]
    zeros = tensor.zeros
    if zeros is None:
        zeros = np.full(tensor.scales.shape, scheme.midpoint - 1, np.uint8)
    group = np.arange(in_features, dtype="<i4") // scheme.group_length(in_features)
    return {
        f"{tensor.name}.qweight": np.ascontiguousarray(pack_int32(tensor.codes, scheme.num_bits).T),
        f"{tensor.name}.qzeros": pack_int32(np.ascontiguousarray(zeros.T), scheme.num_bits),
        f"{tensor.name}.scales": np.ascontiguousarray(tensor.scales.astype("<f2").T),
        f"{tensor.name}.g_idx": group.astype("<i4"),
    }


def unpack(read: Callable[[str], NDArray], module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    out_features, in_features = shape
    words = np.ascontiguousarray(read(f"{module}.qweight").T)
    codes = unpack_int32(words, scheme.num_bits, in_features)
    zeros = None
    if not scheme.symmetric:
        zeros = np.ascontiguousarray(unpack_int32(read(f"{module}.qzeros"), scheme.num_bits, out_features).T)
    scales = np.ascontiguousarray(read(f"{module}.scales").T).astype(SCALE_TYPES[scheme.scale_dtype])
    return QuantizedTensor(module, shape, scheme, codes, scales, zeros)


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """GPTQ's `quantization_config`; it has one scheme for all linears."""
    scheme = uniform(schemes, linears, "gptq")
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "bits": scheme.num_bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def uniform(schemes: Mapping[str, QuantScheme], linears: list[str], name: str) -> QuantScheme:
    """The one scheme of all linears; RecipeError when there are several or a linear has none."""
    distinct, plain = set(schemes.values()), [linear for linear in linears if linear not in schemes]
    if len(distinct) != 1 or plain:
        found = f"{plain[0]} is not quantized" if plain else f"there are {len(distinct)}"
        raise RecipeError(f"the {name} layout has one scheme for all linears, but {found}", "use compressed-tensors")
    return distinct.pop()
