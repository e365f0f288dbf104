"""The GPTQ layout of AutoGPTQ and its successor GPTQModel.

Everything is transposed to `[in, out]`.

NAME.qweight  int32 [in * bits / 32, out]       packed along inputs, low bits first
NAME.qzeros   int32 [groups, out * bits / 32]   symmetric: zero - 1 (format `gptq`); else `gptq_v2`
NAME.scales   fp16  [groups, out]
NAME.g_idx    int32 [in]                        group of each input; ours is always i // group_size

Format `gptq` stores zero points less one. AutoGPTQ subtracts one from each zero point. GPTQModel subtracts from the
whole word, 0x11111111 for 4 bits, so that a zero point of 0 borrows from its neighbour. Words with a 0 therefore
differ; the folder's `meta` says which tool wrote them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.layouts import (
    NEEDS_ORIGINAL,
    Schemes,
    Shapes,
    Stored,
    group_index,
    grouped_scheme,
    is_unquantized,
)
from qwen3_export.core.pack import pack_int32, unpack_int32
from qwen3_export.core.patterns import first_matches
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec
from qwen3_export.errors import CheckpointError, InputWarning, RecipeError


def supports(scheme: QuantScheme) -> str | None:
    """Integers; scales are fp16 here, which holds bf16 ones of our range exactly."""
    if scheme.type != "int" or scheme.activations or not scheme.per_row:
        return "it holds integers with a scale per channel or group, inputs left alone"
    return "its scales are fp16: use scale_dtype bf16 or fp16" if scheme.scale_dtype == "fp32" else None


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme, stored: Stored | None = None) -> dict[str, Spec]:
    """See the package docstring."""
    (out_features, in_features), groups = shape, scheme.num_groups(shape[1])
    # Whole words only; 32 three-bit codes fill three.
    together = 32 if scheme.num_bits == 3 else 32 // scheme.num_bits
    if in_features % together or out_features % together:
        raise RecipeError(f"{module}: {list(shape)} cannot be packed by {together} in the gptq layout")
    found: dict[str, Spec] = {
        f"{module}.qweight": (np.dtype("<i4"), (in_features * scheme.num_bits // 32, out_features)),
        f"{module}.qzeros": (np.dtype("<i4"), (groups, out_features * scheme.num_bits // 32)),
        f"{module}.scales": (np.dtype("<f2"), (groups, out_features)),
    }
    if stored is None or f"{module}.g_idx" in stored:
        found[f"{module}.g_idx"] = (np.dtype("<i4"), (in_features,))
    return {**found, **foreign_floats(stored, module, found)} if stored else found


def foreign_floats(stored: Stored, module: str, found: Mapping[str, Spec]) -> dict[str, Spec]:
    """Another tool's scales in its own type, and its bias of zeros."""
    scales, bias = f"{module}.scales", f"{module}.bias"
    shape = found[scales][1]
    return {
        scales: (stored.dtype(scales), shape),
        **({bias: (stored.dtype(bias), shape[1:])} if bias in stored else {}),
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


def unpack(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    words = np.ascontiguousarray(stored.read(f"{module}.qweight").T)
    codes = unpack_int32(words, scheme.num_bits, shape[1])
    zeros = None if scheme.symmetric else zero_points(stored, module, shape, scheme)
    scales = np.ascontiguousarray(stored.read(f"{module}.scales").T).astype(SCALE_TYPES[scheme.scale_dtype])
    order = group_index(stored, f"{module}.g_idx", shape, scheme)
    return QuantizedTensor(module, shape, scheme, codes, scales, zeros, order)


def zero_points(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> NDArray[np.uint8]:
    """The zero points `[out, groups]`; see the module docstring for those of format `gptq`."""
    bits, words = scheme.num_bits, stored.read(f"{module}.qzeros")
    less_one = bool(stored.config) and format_of(stored.config) == "gptq"
    whole_words = bits != 3 and "gptqmodel" in str(stored.config.get("meta")).lower()
    if less_one and whole_words:
        words = (words.view("<u4") + np.uint32(0xFFFFFFFF // scheme.max_code)).view("<i4")
    zeros = unpack_int32(words, bits, shape[0])
    if less_one and not whole_words:
        zeros = (zeros + np.uint8(1)) & np.uint8(scheme.max_code)
    return np.ascontiguousarray(zeros.T)


def format_of(config: Mapping[str, Any]) -> str:
    """The checkpoint format that a `quantization_config` names, by default `gptq`."""
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """GPTQ's `quantization_config`; it has one scheme for all linears."""
    scheme = uniform(schemes, linears, "gptq", outer=(HEAD,))
    if not scheme.symmetric:
        warnings.warn(
            "the gptq layout with zero points (sym: false, format gptq_v2) loads in GPTQModel and here; vLLM refuses "
            "it, and loaders of the older format add 1 to every zero point. --layout awq (4 bits in groups) and "
            "--layout compressed-tensors load in vLLM and SGLang",
            InputWarning,
            stacklevel=2,
        )
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "bits": scheme.num_bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": HEAD in schemes,
        "pack_dtype": "int32",
    }


def uniform(
    schemes: Mapping[str, QuantScheme], linears: list[str], name: str, outer: tuple[str, ...] = ()
) -> QuantScheme:
    """The one scheme of all linears; RecipeError when there is no such one.

    `outer` names those of embedding and head that the layout can hold quantized beside the linears.
    """
    for module in (EMBEDDING, HEAD):
        if module in schemes and module not in outer:
            raise RecipeError(f"the {name} layout has no place for a quantized {module}", "use compressed-tensors")
    distinct, plain = set(schemes.values()), [linear for linear in linears if linear not in schemes]
    if len(distinct) != 1 or plain:
        found = f"{plain[0]} is not quantized" if plain else f"there are {len(distinct)}"
        raise RecipeError(f"the {name} layout has one scheme for all linears, but {found}", "use compressed-tensors")
    return distinct.pop()


def read_schemes(where: str, stored: Stored, linears: Shapes) -> Schemes:
    """Scheme of every linear that this layout's `quantization_config` quantizes; CheckpointError if it can't say."""
    config, schemes = stored.config, Schemes()
    if (found := format_of(config)) not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{where}: checkpoint_format {found!r}; gptq and gptq_v2 can be read", NEEDS_ORIGINAL)
    if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise CheckpointError(f"{where}: pack_dtype {config['pack_dtype']!r}; int32 was expected", NEEDS_ORIGINAL)
    overridden = _overridden(config, linears)
    for module in linears:
        values = overridden(module)
        if values is not None and not is_unquantized(stored, module, ("qweight", "qzeros", "scales")):
            schemes[module] = grouped_scheme(values.get("bits"), values.get("group_size", 128), stored, module)
    return schemes


def _overridden(config: Mapping[str, Any], modules: Iterable[str]) -> Callable[[str], Mapping[str, Any] | None]:
    """The configuration of each linear under GPTQModel's `dynamic`.

    The first pattern that matches a linear overrides its configuration; with `-:` the linear is not quantized.
    """
    dynamic = dict((config.get("dynamic") or {}).items())
    plain = {key.removeprefix("+:").removeprefix("-:"): key for key in reversed(dynamic)}
    matched = first_matches(list(dict.fromkeys(key.removeprefix("+:").removeprefix("-:") for key in dynamic)), modules)

    def find(module: str) -> Mapping[str, Any] | None:
        key = plain[matched[module]] if module in matched else None
        if key is None:
            return config
        return None if key.startswith("-:") else {**config, **dynamic[key]}

    return find
