"""Folders that other tools quantized: from their `quantization_config` to a scheme for every linear.

quant_method         written by                              layout of the same name
gptq                 AutoGPTQ, GPTQModel, AutoRound          formats gptq and gptq_v2
awq                  AutoAWQ, GPTQModel                      version gemm
fp8                  the official FP8 releases               blocks of N × 128
compressed-tensors   llm-compressor and others               packed, int, float, mxfp4, nvfp4

Where a configuration and the stored numbers disagree, the numbers decide: zero points that all are the
midpoint make a folder symmetric. What a scheme cannot say is refused by name. A head or an embedding may
be quantized where the layout has a place for it: the head in GPTQ, both in compressed-tensors, untied.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.layouts import Stored, group_index, layout
from qwen3_export.core.layouts.compressed_tensors import IDLE
from qwen3_export.core.layouts.gptq import format_of
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.scheme import ACTIVATION_GROUP, QuantScheme
from qwen3_export.core.tensor import SCALE_TYPES
from qwen3_export.errors import CheckpointError, RecipeError

Schemes = dict[str, QuantScheme]
Shapes = Mapping[str, tuple[int, int]]
# Where AutoGPTQ wrote its configuration before transformers knew of it.
FALLBACK = "quantize_config.json"
_ORIGINAL = "give the 16-bit original"
_LINEARS = "give the 16-bit original, or a folder in which the linears of the blocks alone are quantized"
_ROWS = "give the 16-bit original, or a folder whose head and embedding have scales per channel or group"
_PARTS = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv")
_CACHE_PARTS = ("k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale")
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)


def quantization_of(folder: Path, raw: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """The `quantization_config` of a folder, or AutoGPTQ's own file; empty when nothing is quantized."""
    config, where = raw.get("quantization_config"), f"{folder / 'config.json'}: quantization_config"
    path = folder / FALLBACK
    if not config and path.is_file() and any(name.endswith(".qweight") for name in names):
        where = str(path)
        try:
            config = {"quant_method": "gptq", **json.loads(path.read_bytes())}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: no JSON object ({error})") from error
    if not isinstance(config or {}, dict):
        raise CheckpointError(f"{where}: an object was expected, found {type(config).__name__}")
    return config or {}


def read_schemes(where: str, stored: Stored, linears: Shapes) -> tuple[str, Schemes]:
    """Layout and scheme of every quantized matrix of `linears`; GPTQ's and AWQ's are asymmetric until `settle`.

    `linears` holds the embedding too, and an untied head. Raises CheckpointError with the reason when
    the configuration says what no scheme can.
    """
    method = str(stored.config.get("quant_method"))
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise CheckpointError(f"{where}: quantized with quant_method {method!r}; {known} can be read", _ORIGINAL)
    outer = tuple(module for module in _outer(method, stored.config) if module in linears)
    _refuse_outside(where, stored, outer)
    linears = {name: shape for name, shape in linears.items() if name in outer or name not in (EMBEDDING, HEAD)}
    try:
        schemes = _METHODS[method](where, stored, linears)
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}", error.hint or _ORIGINAL) from error
    except (TypeError, ValueError, LookupError, AttributeError, re.error) as error:
        raise CheckpointError(f"{where}: a malformed quantization_config ({error!r})", _ORIGINAL) from error
    for module in outer:
        if module in schemes and (not schemes[module].per_row or schemes[module].scale_dtype == "e4m3"):
            raise CheckpointError(f"{where}: {module} is quantized as {schemes[module].label}: not supported", _ROWS)
    if not schemes:
        raise CheckpointError(f"{where}: quantized by {method}, as it says, but every linear is stored in 16 bits")
    return method, schemes


def settle(method: str, stored: Stored, schemes: Schemes, linears: Shapes) -> tuple[Schemes, frozenset[str]]:
    """Let the small tensors correct the schemes, after every name, type and shape was checked.

    Returns the schemes, and the linears whose groups are not consecutive inputs. Reads zero points,
    scales and group indices, never codes. Raises ValueError naming a tensor that contradicts its scheme.
    """
    if method in ("gptq", "awq"):
        zero_points = layout(method).zero_points
        if all((zero_points(stored, m, linears[m], s) == s.midpoint).all() for m, s in schemes.items()):
            schemes = {module: dataclasses.replace(scheme, symmetric=True) for module, scheme in schemes.items()}
    suffix = "weight_scale" if method == "compressed-tensors" else "scales"
    signed = [module for module, scheme in schemes.items() if scheme.type == "int" and scheme.symmetric]
    if any((stored.read(f"{module}.{suffix}") < 0).any() for module in signed):
        schemes = {**schemes, **{m: dataclasses.replace(schemes[m], signed_scales=True) for m in signed}}
    reordered = set()
    for module, scheme in schemes.items():
        for name in (f"{module}.{idle}" for idle in IDLE if scheme.symmetric or idle != "weight_zero_point"):
            if name in stored and stored.read(name).astype("<f4").any():
                raise ValueError(f"{name}: it is not zero, though this linear has no such thing by its scheme")
        indices = (f"{module}.g_idx", f"{module}.weight_g_idx")
        if any(group_index(stored, name, linears[module], scheme) is not None for name in indices):
            reordered.add(module)
    return schemes, frozenset(reordered)


def _outer(method: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of embedding and head a folder of this kind may hold quantized."""
    if method == "gptq":
        return (HEAD,) if config.get("lm_head") else ()
    return (EMBEDDING, HEAD) if method == "compressed-tensors" else ()


def _refuse_outside(where: str, stored: Stored, outer: tuple[str, ...]) -> None:
    """Only linears of the blocks and `outer` may be quantized: no router, no key/value cache."""
    for name in stored.entries:
        module, _, part = name.rpartition(".")
        if name.endswith(_CACHE_PARTS):
            raise CheckpointError(
                f"{where}: {name}: the key/value cache is quantized, which is not supported", _LINEARS
            )
        inside = module.startswith("model.layers.") and not module.endswith(".mlp.gate")
        if part in _PARTS and not inside and module not in outer:
            raise CheckpointError(f"{where}: {module} is quantized, which is not supported ({name})", _LINEARS)
    if stored.config.get("lm_head") and HEAD not in outer:
        raise CheckpointError(
            f"{where}: lm_head is quantized (lm_head: true), which is not supported beside a tied embedding", _LINEARS
        )


def _is_plain(stored: Stored, module: str, parts: tuple[str, ...]) -> bool:
    """Whether a linear was left in 16 bits: its weight is there, and none of the quantized parts."""
    return f"{module}.weight" in stored and not any(f"{module}.{part}" in stored for part in parts)


def _scale_dtype(stored: Stored, name: str) -> str:
    """The scale type of a scheme, from the stored tensor; what is missing or odd is found by the audit."""
    found = stored.dtype(name)
    return next(key for key, dtype in SCALE_TYPES.items() if dtype == found)


def _grouped(bits: Any, size: Any, stored: Stored, module: str) -> QuantScheme:
    grain = {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
    values = {"num_bits": bits, "symmetric": False, "scale_dtype": _scale_dtype(stored, f"{module}.scales"), **grain}
    return QuantScheme.from_dict(values)


def _gptq(where: str, stored: Stored, linears: Shapes) -> Schemes:
    config, schemes = stored.config, Schemes()
    if (found := format_of(config)) not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{where}: checkpoint_format {found!r}; gptq and gptq_v2 can be read", _ORIGINAL)
    if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise CheckpointError(f"{where}: pack_dtype {config['pack_dtype']!r}; int32 was expected", _ORIGINAL)
    for module in linears:
        values = _overridden(config, module)
        if values is not None and not _is_plain(stored, module, ("qweight", "qzeros", "scales")):
            schemes[module] = _grouped(values.get("bits"), values.get("group_size", 128), stored, module)
    return schemes


def _overridden(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """GPTQModel's `dynamic`: the first pattern that matches overrides, or with `-:` leaves the linear alone."""
    for pattern, changes in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            return None if pattern.startswith("-:") else {**config, **changes}
    return config


def _awq(where: str, stored: Stored, linears: Shapes) -> Schemes:
    config, parts = stored.config, ("qweight", "qzeros", "scales")
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(f"{where}: AWQ version {version!r}; only gemm can be read", _ORIGINAL)
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits != 4:
        raise CheckpointError(f"{where}: AWQ with bits: {bits!r}; 4 was expected", _ORIGINAL)
    quantized = [module for module in linears if not _is_plain(stored, module, parts)]
    return {module: _grouped(bits, size, stored, module) for module in quantized}


def _fp8(where: str, stored: Stored, linears: Shapes) -> Schemes:
    config, wanted = stored.config, {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float"}
    for key, value in wanted.items():
        if (config.get(key) or value) != value:
            raise CheckpointError(f"{where}: FP8 with {key} {config[key]!r}; {value!r} was expected", _ORIGINAL)
    block = config.get("weight_block_size")
    if not isinstance(block, list) or block[1:] != [ACTIVATION_GROUP]:
        raise CheckpointError(f"{where}: FP8 with weight_block_size {block!r}; [128, 128] was expected", _ORIGINAL)
    values = {"num_bits": 8, "type": "float", "strategy": "block", "block_shape": block, "activations": "dynamic-group"}
    return {
        module: QuantScheme.from_dict({**values, "scale_dtype": _scale_dtype(stored, f"{module}.weight_scale_inv")})
        for module in linears
        if not _is_plain(stored, module, ("weight_scale_inv",))
        or stored.entries[f"{module}.weight"].dtype.itemsize == 1
    }


def _compressed_tensors(where: str, stored: Stored, linears: Shapes) -> Schemes:
    config, targets = stored.config, dict[str, tuple[str, Mapping[str, Any]]]()
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise CheckpointError(f"{where}: {key} is set, which is not supported", _ORIGINAL)
    if (sparse := (config.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise CheckpointError(f"{where}: sparsity_config has format {sparse!r}, which is not supported", _ORIGINAL)
    for name, group in config["config_groups"].items():
        found = group.get("format") or config.get("format")
        if found not in _FORMATS:
            raise CheckpointError(f"{where}: {name} has format {found!r}; one of {', '.join(_FORMATS)} was expected")
        if group.get("output_activations"):
            raise CheckpointError(f"{where}: {name} has output_activations, which is not supported", _ORIGINAL)
        targets.update(dict.fromkeys(group["targets"], (name, group)))
    chosen, ignored, schemes = _matcher(targets), _matcher(config.get("ignore") or []), Schemes()
    for module in linears:
        target = chosen(module)
        if target and not ignored(module) and targets[target][1].get("weights"):
            name, group = targets[target]
            scale = _scale_dtype(stored, f"{module}.weight_scale")
            schemes[module] = _group_scheme(f"{where}: {name}", group, scale)
    return schemes


def _matcher(targets: Iterable[str]) -> Callable[[str], str | None]:
    """Finds the target that a module falls under: its name before a pattern before its class."""
    names = frozenset(targets)
    patterns = [(name, re.compile(name[3:])) for name in sorted(names) if name.startswith("re:")]

    def find(module: str) -> str | None:
        if module in names:
            return module
        kind = "Embedding" if module == EMBEDDING else "Linear"
        return next((name for name, pattern in patterns if pattern.match(module)), kind if kind in names else None)

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
        "activations": _activations(where, group.get("input_activations"), kind, bits),
    }
    try:
        return QuantScheme.from_dict(values)
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}", _ORIGINAL) from error


def _activations(where: str, values: Mapping[str, Any] | None, kind: str, bits: int) -> str | None:
    """How inputs are rounded; CheckpointError for a way that we cannot follow."""
    if not values:
        return None
    symmetric, dynamic = values.get("symmetric", True), values.get("dynamic", False)
    found = (values.get("strategy"), dynamic, values.get("group_size") if values.get("strategy") == "group" else None)
    same = (values.get("type", "int"), values.get("num_bits", 8)) == (kind, bits)
    if not (same and symmetric and bits == 8 and found in _ACTIVATIONS):
        shown = ", ".join(
            f"{key}: {values[key]}" for key in ("num_bits", "type", "symmetric", "strategy", "dynamic") if key in values
        )
        raise CheckpointError(
            f"{where} rounds inputs by {{{shown}}} beside {bits}-bit {kind} weights, which is not supported",
            "inputs can be rounded to the weights' own 8-bit type: per token or per 128 inputs, or by a static scale",
        )
    return _ACTIVATIONS[found]


_ACTIVATIONS = {
    ("token", True, None): "dynamic-token",
    ("group", True, ACTIVATION_GROUP): "dynamic-group",
    ("tensor", False, None): "static-tensor",
}
_METHODS: dict[str, Callable[[str, Stored, Shapes], Schemes]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
