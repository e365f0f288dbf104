"""compressed-tensors' `quantization_config`: how it is written, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qwen3_export.core.architecture import ROUTER, is_expert
from qwen3_export.core.layouts import NEEDS_ORIGINAL, Schemes, Shapes, Stored, scale_dtype_of
from qwen3_export.core.layouts.compressed_tensors.formats import FP4, format_of
from qwen3_export.core.patterns import first_matches
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.scheme import ACTIVATION_GROUP, NVFP4_GROUP, QuantScheme
from qwen3_export.errors import CheckpointError, RecipeError


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`: one group of targets per scheme.

    Matrices that stay in 16 bits are in `ignore`. An embedding is not a `Linear`, so it is a target by its name, which
    takes precedence over any class.
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
    routers = [f"re:.*{ROUTER}$"] if any(map(is_expert, linears)) else []
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
    if scheme.scale_dtype in FP4:  # of MXFP8 too
        found["scale_dtype"] = found["zp_dtype"] = "torch.float8_e4m3fn" if nvfp4 else "torch.uint8"
    return found


def _activations(scheme: QuantScheme) -> dict[str, Any] | None:
    if scheme.activations is None:
        return None
    if scheme.num_bits == 4:
        # "local": the scales of groups are found as inputs come, the one above them is stored.
        return {**_weights(scheme), "dynamic": "local"}
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
    "mxfp8-quantized",
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
    """A function that finds the target that a module falls under.

    The module's name takes precedence over a pattern, and a pattern over its class.
    """
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
    elif kind == "float" and str(weights.get("scale_dtype")).endswith("uint8"):
        scale_dtype = "e8m0"
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
    in_groups = values.get("strategy") in ("group", "tensor_group")
    found = (bits, values.get("strategy"), dynamic, values.get("group_size") if in_groups else None)
    same = (values.get("type", "int"), values.get("num_bits", 8)) == (kind, bits)
    if not (same and symmetric and found in _ROUNDED_INPUTS):
        shown = ", ".join(
            f"{key}: {values[key]}" for key in ("num_bits", "type", "symmetric", "strategy", "dynamic") if key in values
        )
        raise CheckpointError(
            f"{where} rounds inputs by {{{shown}}} beside {bits}-bit {kind} weights, which is not supported",
            "inputs can be rounded to the weights' own 8-bit type: per token or per 128 inputs, or by a static scale; "
            "or to NVFP4 beside NVFP4 weights",
        )
    return _ROUNDED_INPUTS[found]


_ROUNDED_INPUTS = {
    (8, "token", True, None): "dynamic-token",
    (8, "group", True, ACTIVATION_GROUP): "dynamic-group",
    (8, "tensor", False, None): "static-tensor",
    (4, "tensor_group", "local", NVFP4_GROUP): "dynamic-group",
}
