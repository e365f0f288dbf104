"""compressed-tensors: what vLLM, SGLang and transformers load as it is. Its format follows from the scheme.

pack-quantized        integers, inputs left alone
    NAME.weight_packed      int32 [out, in * bits / 32]     low bits first, across words for 3 bits
    NAME.weight_scale       [out, groups]
    NAME.weight_zero_point  int32 [out * bits / 32, groups] asymmetric only, packed along out
    NAME.weight_shape       int64 [2]
    NAME.weight_g_idx       int32 [in]              group of each input; in older folders of other tools only
int-quantized, float-quantized      8-bit weights whose inputs are rounded, and all FP8
    NAME.weight             int8 (code − 128) or E4M3 [out, in]
    NAME.weight_scale       [out, 1], [rows, groups] for blocks, [1] for a whole tensor
    NAME.weight_zero_point  int8, asymmetric only
    NAME.input_scale        [1], static activations only
mxfp4-pack-quantized, nvfp4-pack-quantized
    NAME.weight_packed      uint8 [out, in / 2]             two E2M1 codes, low nibble first
    NAME.weight_scale       uint8 exponents, or E4M3 [out, groups]
    NAME.weight_global_scale  fp32 [1]                      nvfp4 only; scales are divided by it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.layouts import IDLE, NEEDS_ORIGINAL, Schemes, Shapes, Stored, group_index, scale_dtype_of
from qwen3_export.core.pack import pack_bytes, pack_int32, unpack_bytes, unpack_int32
from qwen3_export.core.patterns import first_matches
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.scheme import ACTIVATION_GROUP, QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import Spec
from qwen3_export.errors import CheckpointError, RecipeError

_E4M3, _INT8, _BYTE = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype("i1"), np.dtype("u1")
_FP4 = {"e8m0": "mxfp4-pack-quantized", "e4m3": "nvfp4-pack-quantized"}
# Written by some releases beside symmetric weights or inputs, and then all zeros.


def format_of(scheme: QuantScheme) -> str:
    """compressed-tensors' name of the format that holds a scheme."""
    if scheme.type == "float":
        return _FP4.get(scheme.scale_dtype, "float-quantized" if scheme.activations else "naive-quantized")
    return "int-quantized" if scheme.activations else "pack-quantized"


def supports(scheme: QuantScheme) -> str | None:
    """Everything fits but integers in blocks, and block types of ggml."""
    if scheme.ggml_type is not None:
        return f"{scheme.ggml_type} is a block type of ggml: use layout ggml"
    if scheme.type == "int" and not scheme.activations and not scheme.per_row:
        return "packed integers have a scale per channel or group"
    return None


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme, stored: Stored | None = None) -> dict[str, Spec]:
    """See the package docstring."""
    (out_features, in_features), kind = shape, format_of(scheme)
    scale = SCALE_TYPES[scheme.scale_dtype]
    found: dict[str, Spec] = {}
    if _is_packed(kind, module, stored):
        found[f"{module}.weight_packed"] = (np.dtype("<i4"), (out_features, _words(in_features, scheme)))
        found[f"{module}.weight_scale"] = (scale, scheme.grid(shape))
        if not scheme.symmetric:
            words = (_words(out_features, scheme), scheme.num_groups(in_features))
            found[f"{module}.weight_zero_point"] = (np.dtype("<i4"), words)
        found[f"{module}.weight_shape"] = (np.dtype("<i8"), (2,))
    elif kind in _FP4.values():
        found[f"{module}.weight_packed"] = (_BYTE, (out_features, in_features // 2))
        found[f"{module}.weight_scale"] = (_BYTE if scheme.scale_dtype == "e8m0" else _E4M3, scheme.grid(shape))
        if scheme.scale_dtype == "e4m3":
            found[f"{module}.weight_global_scale"] = (np.dtype("<f4"), (1,))
    else:
        found[f"{module}.weight"] = (_E4M3 if scheme.type == "float" else _INT8, shape)
        found[f"{module}.weight_scale"] = (scale, _scale_shape(shape, scheme))
        if not scheme.symmetric:
            found[f"{module}.weight_zero_point"] = (_INT8, scheme.grid(shape))
        if scheme.activations == "static-tensor":
            found[f"{module}.input_scale"] = (SCALE_TYPES["bf16"], (1,))
    return {**found, **_foreign(stored, module, shape, scheme, found)} if stored else found


def _is_packed(kind: str, module: str, stored: Stored | None) -> bool:
    """Whether integers are packed: by their scheme where we write them, by the tensor's name where others did."""
    if kind not in ("pack-quantized", "int-quantized"):
        return False
    if stored is None or (f"{module}.weight_packed" in stored) == (f"{module}.weight" in stored):
        return kind == "pack-quantized"
    return f"{module}.weight_packed" in stored


def _foreign(
    stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme, found: Mapping[str, Spec]
) -> dict[str, Spec]:
    """What other releases store in another type or shape, or beside the tensors that are needed."""
    specs: dict[str, Spec] = {}
    for name, (dtype, wanted) in found.items():
        suffix = name.rpartition(".")[2]
        if suffix == "weight_zero_point" and stored.dtype(name, dtype, _INT8) == _INT8:
            specs[name] = (_INT8, stored.shape(name, scheme.grid(shape)))
        elif suffix == "input_scale":
            specs[name] = (stored.dtype(name), stored.shape(name, wanted))
        elif suffix == "weight_shape":
            specs[name] = (stored.dtype(name, dtype, np.dtype("<i4")), wanted)
        elif suffix in ("weight_scale", "weight_global_scale"):
            specs[name] = (dtype, stored.shape(name, wanted))
    if (order := f"{module}.weight_g_idx") in stored:
        specs[order] = (np.dtype("<i4"), shape[1:])
    for suffix in IDLE:
        if (name := f"{module}.{suffix}") in stored and name not in found:
            specs[name] = (stored.entries[name].dtype, stored.entries[name].shape)
    return specs


def _words(count: int, scheme: QuantScheme) -> int:
    return math.ceil(count * scheme.num_bits / 32)


def _scale_shape(shape: tuple[int, int], scheme: QuantScheme) -> tuple[int, ...]:
    return (1,) if scheme.strategy == "tensor" else scheme.grid(shape)


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring."""
    name, scheme, kind = tensor.name, tensor.scheme, format_of(tensor.scheme)
    arrays: dict[str, NDArray]
    if kind == "pack-quantized":
        arrays = {f"{name}.weight_packed": pack_int32(tensor.codes, scheme.num_bits)}
        arrays[f"{name}.weight_scale"] = tensor.scales
        if tensor.zeros is not None:
            words = pack_int32(np.ascontiguousarray(tensor.zeros.T), scheme.num_bits)
            arrays[f"{name}.weight_zero_point"] = np.ascontiguousarray(words.T)
        return {**arrays, f"{name}.weight_shape": np.array(tensor.shape, "<i8")}
    if kind in _FP4.values():
        scales = tensor.scales.view(_BYTE) if scheme.scale_dtype == "e8m0" else tensor.scales
        arrays = {f"{name}.weight_packed": pack_bytes(tensor.codes, 4), f"{name}.weight_scale": scales}
        if tensor.global_scale is not None:
            arrays[f"{name}.weight_global_scale"] = np.array([tensor.global_scale], "<f4")
        return arrays
    codes = tensor.codes.view(_E4M3) if scheme.type == "float" else _signed(tensor.codes)
    arrays = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": tensor.scales.reshape(_scale_shape(tensor.shape, scheme)),
    }
    if tensor.zeros is not None:
        arrays[f"{name}.weight_zero_point"] = _signed(tensor.zeros)
    if tensor.input_scale is not None:
        arrays[f"{name}.input_scale"] = np.array([tensor.input_scale], SCALE_TYPES["bf16"])
    return arrays


def _signed(codes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Unsigned codes with the zero point 128 taken off; its own inverse on the bits."""
    return (codes ^ np.uint8(0x80)).view(np.int8)


def unpack(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    kind, scales = format_of(scheme), stored.read(f"{module}.weight_scale").reshape(scheme.grid(shape))
    if kind in _FP4.values():
        codes, scales = unpack_bytes(stored.read(f"{module}.weight_packed"), 4), scales.view(_scale_type(scheme))
        shared = float(stored.read(f"{module}.weight_global_scale").item()) if scheme.scale_dtype == "e4m3" else None
        return QuantizedTensor(module, shape, scheme, codes, scales, global_scale=shared)
    if _is_packed(kind, module, stored):
        codes = unpack_int32(stored.read(f"{module}.weight_packed"), scheme.num_bits, shape[1])
    else:
        weight = stored.read(f"{module}.weight").view(np.uint8)
        codes = weight if scheme.type == "float" else _unsigned(weight, scheme)
    zeros = None if scheme.symmetric else _zero_points(stored, module, shape, scheme)
    static = scheme.activations == "static-tensor"
    fixed = float(stored.read(f"{module}.input_scale").item()) if static else None
    order = group_index(stored, f"{module}.weight_g_idx", shape, scheme)
    return QuantizedTensor(module, shape, scheme, codes, scales, zeros, order, input_scale=fixed)


def _scale_type(scheme: QuantScheme) -> np.dtype:
    return SCALE_TYPES[scheme.scale_dtype]


def _unsigned(stored: NDArray[np.uint8], scheme: QuantScheme) -> NDArray[np.uint8]:
    """Signed codes, each in a byte, with the midpoint added."""
    return stored + np.uint8(scheme.midpoint)


def _zero_points(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> NDArray[np.uint8]:
    zeros = stored.read(f"{module}.weight_zero_point")
    if zeros.dtype == _INT8:
        return _unsigned(zeros.view(np.uint8), scheme).reshape(scheme.grid(shape))
    return np.ascontiguousarray(unpack_int32(np.ascontiguousarray(zeros.T), scheme.num_bits, shape[0]).T)


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """One group of targets per distinct scheme; what stays in 16 bits is in `ignore`.

    An embedding is no `Linear`, so it is a target by its name, which comes before any class.
    """
    distinct, formats = list(dict.fromkeys(schemes.values())), {format_of(scheme) for scheme in schemes.values()}
    groups = {}
    for number, scheme in enumerate(distinct):
        members = [name for name, found in schemes.items() if found == scheme]
        groups[f"group_{number}"] = {
            "targets": [*(["Linear"] if set(members) - {EMBEDDING} else []), *({EMBEDDING} & {*members})]
            if len(distinct) == 1
            else members,
            "weights": _weights(scheme),
            "input_activations": _activations(scheme),
            "output_activations": None,
            **({"format": format_of(scheme)} if len(formats) > 1 else {}),
        }
    plain = [name for name in linears if name not in schemes]
    routers = ["re:.*mlp.gate$"] if any(map(is_expert, linears)) else []
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*([] if HEAD in schemes else [HEAD]), *routers, *plain],
    }


def _weights(scheme: QuantScheme) -> dict[str, Any]:
    nvfp4 = scheme.scale_dtype == "e4m3"
    found: dict[str, Any] = {
        "num_bits": scheme.num_bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if nvfp4 else scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.block_shape:
        found["block_structure"] = list(scheme.block_shape)
    if scheme.scale_dtype in _FP4:
        found["scale_dtype"] = found["zp_dtype"] = "torch.float8_e4m3fn" if nvfp4 else "torch.uint8"
    return found


def _activations(scheme: QuantScheme) -> dict[str, Any] | None:
    if scheme.activations is None:
        return None
    strategies = {"dynamic-token": "token", "dynamic-group": "group", "static-tensor": "tensor"}
    return {
        "num_bits": scheme.num_bits,
        "type": scheme.type,
        "symmetric": True,
        "strategy": strategies[scheme.activations],
        "group_size": ACTIVATION_GROUP if scheme.activations == "dynamic-group" else None,
        "dynamic": scheme.activations != "static-tensor",
    }


_READABLE = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)


def read_schemes(where: str, stored: Stored, linears: Shapes) -> Schemes:
    """Scheme of every linear that this layout's `quantization_config` quantizes; CheckpointError if it can't say."""
    config, targets = stored.config, dict[str, tuple[str, Mapping[str, Any]]]()
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise CheckpointError(f"{where}: {key} is set, which is not supported", NEEDS_ORIGINAL)
    if (sparse := (config.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise CheckpointError(f"{where}: sparsity_config has format {sparse!r}, which is not supported", NEEDS_ORIGINAL)
    for name, group in config["config_groups"].items():
        found = group.get("format") or config.get("format")
        if found not in _READABLE:
            raise CheckpointError(f"{where}: {name} has format {found!r}; one of {', '.join(_READABLE)} was expected")
        if group.get("output_activations"):
            raise CheckpointError(f"{where}: {name} has output_activations, which is not supported", NEEDS_ORIGINAL)
        targets.update(dict.fromkeys(group["targets"], (name, group)))
    chosen, ignored = _target_matcher(targets, linears), _target_matcher(config.get("ignore") or [], linears)
    schemes = Schemes()
    for module in linears:
        target = chosen(module)
        if target and not ignored(module) and targets[target][1].get("weights"):
            name, group = targets[target]
            scale = scale_dtype_of(stored, f"{module}.weight_scale")
            schemes[module] = _group_scheme(f"{where}: {name}", group, scale)
    return schemes


def _target_matcher(targets: Iterable[str], modules: Iterable[str]) -> Callable[[str], str | None]:
    """Finds the target that a module falls under: its name before a pattern before its class."""
    names = frozenset(targets)
    matched = first_matches([name[3:] for name in sorted(names) if name.startswith("re:")], modules)

    def find(module: str) -> str | None:
        if module in names:
            return module
        kind = "Embedding" if module == EMBEDDING else "Linear"
        return f"re:{matched[module]}" if module in matched else kind if kind in names else None

    return find


def _group_scheme(where: str, group: Mapping[str, Any], scale_dtype: str) -> QuantScheme:
    """The scheme of one of compressed-tensors' groups."""
    weights, size = group["weights"], group["weights"].get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if (kind, bits) == ("float", 4):
        scale_dtype = "e8m0" if size == 32 else "e4m3"
    values = {
        "num_bits": bits,
        "type": kind,
        "symmetric": weights.get("symmetric", True),
        "strategy": "group" if strategy == "tensor_group" else strategy,
        "group_size": size,
        "block_shape": weights.get("block_structure"),
        "scale_dtype": scale_dtype,
        "activations": _read_activations(where, group.get("input_activations"), kind, bits),
    }
    try:
        return QuantScheme.from_dict(values)
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}", NEEDS_ORIGINAL) from error


def _read_activations(where: str, values: Mapping[str, Any] | None, kind: str, bits: int) -> str | None:
    """How inputs are rounded; CheckpointError for a way that we cannot follow."""
    if not values:
        return None
    symmetric, dynamic = values.get("symmetric", True), values.get("dynamic", False)
    found = (values.get("strategy"), dynamic, values.get("group_size") if values.get("strategy") == "group" else None)
    same = (values.get("type", "int"), values.get("num_bits", 8)) == (kind, bits)
    if not (same and symmetric and bits == 8 and found in _ROUNDED_INPUTS):
        shown = ", ".join(
            f"{key}: {values[key]}" for key in ("num_bits", "type", "symmetric", "strategy", "dynamic") if key in values
        )
        raise CheckpointError(
            f"{where} rounds inputs by {{{shown}}} beside {bits}-bit {kind} weights, which is not supported",
            "inputs can be rounded to the weights' own 8-bit type: per token or per 128 inputs, or by a static scale",
        )
    return _ROUNDED_INPUTS[found]


_ROUNDED_INPUTS = {
    ("token", True, None): "dynamic-token",
    ("group", True, ACTIVATION_GROUP): "dynamic-group",
    ("tensor", False, None): "static-tensor",
}
