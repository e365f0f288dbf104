"""Folders that other tools quantized: from their `quantization_config` to a scheme for every linear.

quant_method         written by                              layout of the same name
auto-round           AutoRound                               packed as gptq or awq
modelopt             NVIDIA ModelOpt, FP8 and NVFP4          modelopt; in hf_quant_config.json too
gptq                 AutoGPTQ, GPTQModel, AutoRound          formats gptq and gptq_v2
awq                  AutoAWQ, GPTQModel                      version gemm
fp8                  the official FP8 releases               blocks of N × 128
compressed-tensors   llm-compressor and others               packed, int, float, mxfp4, nvfp4

Where a configuration and the stored numbers disagree, the numbers decide: if all zero points are the midpoint, the
folder is symmetric. Settings that no scheme can express are refused by name. An untied head may be quantized in GPTQ
folders, an untied head and the embedding in those of compressed-tensors.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.architecture import ROUTER
from qwen3_export.core.files import read_object
from qwen3_export.core.layouts import IDLE, NEEDS_ORIGINAL, Schemes, Shapes, Stored, group_index, layout
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.errors import CheckpointError, RecipeError

# Where AutoGPTQ wrote its configuration before transformers knew of it.
FALLBACK = "quantize_config.json"
# Where ModelOpt writes it, besides config.json in later releases.
MODELOPT = "hf_quant_config.json"
METHODS = ("gptq", "awq", "fp8", "compressed-tensors", "modelopt")
# AutoRound's packing formats: zero points stored less one, stored as they are, or in AWQ's order.
_AUTO_ROUND = {
    "auto_round:auto_gptq": ("gptq", "gptq"),
    "auto_round": ("gptq", "gptq_v2"),
    "auto_round:gptqmodel": ("gptq", "gptq_v2"),
    "auto_round:auto_awq": ("awq", "gemm"),
}
_UNQUANTIZED_BITS = 16
_LINEARS = "give the 16-bit original, or a folder in which the linears of the blocks alone are quantized"
_ROWS = "give the 16-bit original, or a folder whose head and embedding have scales per channel or group"
_PARTS = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv")
_CACHE_PARTS = ("k_scale", "v_scale", "k_proj.output_scale", "v_proj.output_scale")


def quantization_of(folder: Path, raw: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """The `quantization_config` of a folder, or AutoGPTQ's own file; empty when nothing is quantized."""
    config, where = raw.get("quantization_config"), f"{folder / 'config.json'}: quantization_config"
    path = folder / FALLBACK
    if not config and os.path.lexists(path) and any(name.endswith(".qweight") for name in names):
        where = str(path)
        config = {"quant_method": "gptq", **read_object(path, CheckpointError)}
    if not config and os.path.lexists(folder / MODELOPT):
        where = str(folder / MODELOPT)
        config = read_object(folder / MODELOPT, CheckpointError).get("quantization")
        config = {"quant_method": "modelopt", **config} if isinstance(config, dict) else config
    if not isinstance(config or {}, dict):
        raise CheckpointError(f"{where}: an object was expected, found {type(config).__name__}")
    return _of_auto_round(where, config) if config and config.get("quant_method") == "auto-round" else config or {}


def _of_auto_round(where: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """AutoRound's configuration, rewritten as that of the layout it packs in."""
    packing = config.get("packing_format") or "auto_round:auto_gptq"
    if not isinstance(packing, str) or packing not in _AUTO_ROUND or config.get("data_type", "int") != "int":
        raise CheckpointError(
            f"{where}: AutoRound with packing_format {packing!r} and data_type {config.get('data_type', 'int')!r}; "
            f"integers in {', '.join(_AUTO_ROUND)} can be read",
            NEEDS_ORIGINAL,
        )
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(values, dict) for values in extra.values()):
        raise CheckpointError(f"{where}: extra_config is no object of objects")
    method, kind = _AUTO_ROUND[packing]
    dynamic = {
        f"{'-' if values.get('bits', 4) == _UNQUANTIZED_BITS else '+'}:{re.escape(name)}$": values
        for name, values in extra.items()
    }
    return {
        "quant_method": method,
        "version" if method == "awq" else "checkpoint_format": kind,
        "bits": config.get("bits"),
        "group_size": config.get("group_size"),
        "lm_head": HEAD in extra and extra[HEAD].get("bits") != _UNQUANTIZED_BITS,
        "dynamic": dynamic,
    }


def read_schemes(where: str, stored: Stored, linears: Shapes) -> tuple[str, Schemes]:
    """The layout of a folder, and the scheme of every quantized matrix of `linears`.

    `linears` includes the embedding and an untied head. Schemes of GPTQ and AWQ folders are asymmetric until `settle`
    has looked at the zero points. Raises CheckpointError with the reason when no scheme can express the configuration.
    """
    method = str(stored.config.get("quant_method") or stored.config.get("format"))
    if method == "bitsandbytes":
        raise CheckpointError(
            f"{where}: quantized by bitsandbytes, whose folders only it can read",
            "give the 16-bit original, or load it in transformers, call model.dequantize() and save_pretrained()",
        )
    if method not in METHODS:
        known = ", ".join((*METHODS, "auto-round"))
        raise CheckpointError(f"{where}: quantized with quant_method {method!r}; {known} can be read", NEEDS_ORIGINAL)
    outer = tuple(module for module in _outer(method, stored.config) if module in linears)
    _refuse_outside(where, stored, outer)
    linears = {name: shape for name, shape in linears.items() if name in outer or name not in (EMBEDDING, HEAD)}
    try:
        schemes = layout(method).read_schemes(where, stored, linears)
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}", error.hint or NEEDS_ORIGINAL) from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: a malformed quantization_config ({error!r})", NEEDS_ORIGINAL) from error
    for module in outer:
        if module in schemes and (not schemes[module].per_row or schemes[module].scale_dtype == "e4m3"):
            raise CheckpointError(f"{where}: {module} is quantized as {schemes[module].label}: not supported", _ROWS)
    if not schemes:
        raise CheckpointError(f"{where}: quantized by {method}, as it says, but every linear is stored in 16 bits")
    return method, schemes


def settle(method: str, stored: Stored, schemes: Schemes, linears: Shapes) -> tuple[Schemes, frozenset[str]]:
    """Correct the schemes by the stored zero points, scales and group indices.

    Names, types and shapes must have been checked before; codes are not read. Returns the schemes, and the linears
    whose groups are not consecutive inputs. Raises ValueError naming a tensor that contradicts its scheme.
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
    """Refuse quantized parts other than linears of the blocks and `outer`: routers, key/value caches."""
    for name in stored.entries:
        module, _, part = name.rpartition(".")
        if name.endswith(_CACHE_PARTS) and stored.config.get("quant_method") != "modelopt":
            raise CheckpointError(
                f"{where}: {name}: the key/value cache is quantized, which is not supported", _LINEARS
            )
        inside = module.startswith("model.layers.") and not module.endswith(f".{ROUTER}")
        if part in _PARTS and not inside and module not in outer:
            raise CheckpointError(f"{where}: {module} is quantized, which is not supported ({name})", _LINEARS)
    if stored.config.get("lm_head") and HEAD not in outer:
        raise CheckpointError(
            f"{where}: lm_head is quantized (lm_head: true), which is not supported beside a tied embedding", _LINEARS
        )
