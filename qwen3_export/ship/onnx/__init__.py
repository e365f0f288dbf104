"""ONNX folders: graph, data, `config.json`, tokenizer, and files for onnxruntime-genai.

Flavor `ort` is written in ONNX Runtime's fused operators, `standard` in ai.onnx operators alone; `ship.onnx.target`
says which target gets what.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.growing_hash import GrowingHash
from qwen3_export.core.manifest import file_list, to_json, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.progress import Progress
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.text_files import warn_of_text_files
from qwen3_export.core.tokenizer_files import TOKENIZER, has_tokenizer, tokenizer_values
from qwen3_export.errors import InputError, UnsupportedError
from qwen3_export.ship.exactness import cast_errors
from qwen3_export.ship.onnx import experts, nbits, ort_ops, standard_ops, w8a8
from qwen3_export.ship.onnx.cache import BITS, QuantizedCache
from qwen3_export.ship.onnx.decoder import build_decoder
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.onnx.library import ir
from qwen3_export.ship.onnx.sidecars import context_length, genai_config, model_config
from qwen3_export.ship.onnx.target import MOST_WEB_SHARDS, PRECISIONS, Files, Target, choose, files_of
from qwen3_export.ship.result import check_schemes, exactness, export_result, onnx_linear_bytes, provenance

TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# What an accuracy level costs: gets the folder, returns values for the manifest.
Measure = Callable[[Path], dict[str, Any]]
# A quantized cache's scales, keys' and values' of each layer, from a folder with a plain cache and the bits; and its
# cost, from both folders.
CacheScales = Callable[[Path, int], Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]]
StudyCache = tuple[CacheScales, Callable[[Path, Path], dict[str, Any]]]
_PLAIN = "plain-cache"
# What GroupQueryAttention's heads must be a multiple of.
_HEAD_DIM = 8


def export_onnx(
    checkpoint: Checkpoint,
    output: Path,
    flavor: str | None = None,
    precision: str | None = None,
    accuracy_level: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    target: str = "cpu",
    max_shard_size: int | None = None,
    measure: Measure | None = None,
    kv_cache: str | None = None,
    study_cache: StudyCache | None = None,
    opset: int | None = None,
) -> dict[str, Any]:
    """Write an ONNX folder.

    Codes and scales land unchanged. Returns the result that `--json` prints.

    `max_shard_size` in bytes: data beyond it goes to a next file. `measure` is asked for the cost of an accuracy level
    that rounds. `kv_cache` int8 or int4 keeps keys and values as codes; `study_cache` finds their scales and cost.
    Raises UnsupportedError, before anything is written, when a tensor's scheme does not fit.
    """
    started, progress = time.monotonic(), progress or Progress()
    aim = check_request(checkpoint, flavor, precision, accuracy_level, target, max_shard_size, kv_cache, opset)
    _warn_of_browsers(aim, checkpoint, progress)
    warn_of_text_files(checkpoint.folder, checkpoint.name, progress)
    checkpoint.hash_ahead()
    files, inexact = files_of(aim, checkpoint), cast_errors(checkpoint, aim.precision)
    with staged_folder(output, force, inputs=[checkpoint.folder]) as folder:
        cache = _calibrated(checkpoint, folder, aim, kv_cache, study_cache, progress)
        hashes, sparse = write_graph(checkpoint, folder, aim, files, progress, cache)
        _check_shards(aim, len(hashes))
        _write_sidecars(checkpoint, folder, aim, files, len(hashes), cache)
        # The level's cost is that of a plain cache, so that both costs add up.
        level = _level(checkpoint, aim, folder if cache is None else folder / _PLAIN, measure)
        level = {**_cost_of(cache, folder, study_cache, kv_cache if cache and kv_cache else aim.precision), **level}
        values = {
            "target": aim.name, "flavor": aim.flavor, "precision": aim.precision,
            **level, **_described(cache), **provenance(checkpoint), **exactness(inexact), **sparse,
        }  # fmt: skip
        write_manifest(folder, "onnx", values)
        written = file_list(folder, {name: found.result() for name, found in hashes.items()})
    result = export_result(output, written, checkpoint, inexact, started, onnx_linear_bytes(output))
    return {**result, **level, **sparse}


def _warn_of_browsers(target: Target, checkpoint: Checkpoint, progress: Progress) -> None:
    """Say what WebGPU's fast kernels are not made for."""
    for name, scheme in checkpoint.schemes.items() if target.is_web else ():
        if (scheme.num_bits, scheme.symmetric, scheme.group_size) != (4, True, 32):
            progress.warn(
                f"{name} is {scheme.label}: WebGPU's fast kernels are for symmetric 4-bit groups of 32, as edge-w4 has"
            )
            return


def _level(checkpoint: Checkpoint, target: Target, folder: Path, measure: Measure | None) -> dict[str, Any]:
    """The accuracy level, and what it costs where it rounds.

    None where no level has a say: 16-bit weights are multiplied as they are, and W8A8's inputs always rounded.
    """
    if all(w8a8.fits(scheme) for scheme in checkpoint.schemes.values()):
        return {"accuracy_level": None}
    rounds = target.accuracy_level > 0
    cost = measure(folder) if measure and rounds else {}
    if reason := cost.get("added_kl_reason"):
        # The folder that is measured gets another name later; what it lacks the source lacks.
        cost["added_kl_reason"] = reason.replace(str(folder), checkpoint.name)
    return {"accuracy_level": target.accuracy_level, **cost}


def _check_shards(target: Target, shards: int) -> None:
    if target.is_web and shards > MOST_WEB_SHARDS:
        raise UnsupportedError(
            f"--max-shard-size makes {shards} data files, transformers.js reads {MOST_WEB_SHARDS}",
            "choose a larger --max-shard-size",
        )


def _write_sidecars(
    checkpoint: Checkpoint, folder: Path, target: Target, files: Files, shards: int, cache: QuantizedCache | None = None
) -> None:
    for path in checkpoint.sidecars():
        shutil.copyfile(path, folder / path.name)
    if checkpoint.folder.joinpath("vocab.json").is_file() and not (folder / TOKENIZER).exists():
        # onnxruntime-genai reads no other kind.
        (folder / TOKENIZER).write_text(to_json(tokenizer_values(checkpoint.folder)), encoding="utf-8")
    configs = {"config.json": model_config(checkpoint, target, files, shards)}
    if target.flavor == "ort":
        configs["genai_config.json"] = genai_config(checkpoint, target, files, shares_cache=cache is None)
    for name, values in configs.items():
        (folder / name).write_text(to_json(values), encoding="utf-8")


def check_request(
    checkpoint: Checkpoint,
    flavor: str | None = None,
    precision: str | None = None,
    accuracy_level: int | None = None,
    target: str = "cpu",
    max_shard_size: int | None = None,
    kv_cache: str | None = None,
    opset: int | None = None,
) -> Target:
    """Everything that can be known before the long work.

    A recipe's target is checked by it too, before quantizing.

    Raises InputError for an unknown option, UnsupportedError for the first tensor that does not fit.
    """
    aim = choose(target, flavor, precision, accuracy_level, max_shard_size, opset)
    supports = ort_ops.supports if aim.flavor == "ort" else standard_ops.supports
    check_schemes(checkpoint, supports, f"onnx ({aim.flavor})", experts.supports, _elsewhere(aim.flavor))
    experts.sparse_layers(checkpoint)
    if aim.flavor == "ort":
        _check_shapes(checkpoint)
    files_of(aim, checkpoint)
    if kv_cache in PRECISIONS and kv_cache != aim.precision:
        raise InputError(
            f"--kv-cache {kv_cache}: beside {aim.precision} activations the cache is {aim.precision}",
            f"--precision {kv_cache}, or leave --kv-cache away",
        )
    if kv_cache is not None and kv_cache not in (*PRECISIONS, *BITS):
        raise InputError(f"--kv-cache {kv_cache}: one of fp32, int8, int4 was expected")
    if kv_cache in BITS and (aim.flavor, aim.precision, aim.name) != ("ort", "fp32", "cpu"):
        raise InputError(
            f"--kv-cache {kv_cache} is GroupQueryAttention's of ONNX Runtime's CPU kernels, beside fp32 activations",
            "leave --target, --flavor and --precision away",
        )
    if kv_cache in BITS and not has_tokenizer(checkpoint.folder):
        raise InputError(
            f"--kv-cache {kv_cache} is calibrated on text, and {checkpoint.folder / TOKENIZER} is missing",
            "copy the tokenizer files of the original model into the folder, or leave --kv-cache away",
        )
    return aim


def _elsewhere(flavor: str) -> Callable[[QuantScheme], str | None]:
    """Which target holds a scheme that a flavor does not."""
    other = standard_ops.supports if flavor == "ort" else ort_ops.supports
    hint = "standard holds it exactly, in ai.onnx operators alone" if flavor == "ort" else "cpu holds it exactly"
    return lambda scheme: None if other(scheme) else f"--target {hint}"


def _check_shapes(checkpoint: Checkpoint) -> None:
    """Refuse sizes that ONNX Runtime's kernels cannot compute with."""
    head_dim, shapes = checkpoint.config.head_dim, checkpoint.config.all_matrices()
    if head_dim % _HEAD_DIM:
        raise UnsupportedError(
            f"{checkpoint.folder}: heads of {head_dim}; GroupQueryAttention needs a multiple of {_HEAD_DIM}",
            "--target standard has no such limit",
        )
    for name, scheme in checkpoint.schemes.items():
        whole = w8a8.fits(scheme) or is_expert(name) or nbits.divides(scheme, shapes[name][1])
        if not whole:
            raise UnsupportedError(
                f"{name} ({scheme.label}): MatMulNBits takes rows of a multiple of 16, not of {shapes[name][1]}",
                "--target standard has no such limit",
            )


def _calibrated(
    checkpoint: Checkpoint,
    folder: Path,
    aim: Target,
    kv_cache: str | None,
    study: StudyCache | None,
    progress: Progress,
) -> QuantizedCache | None:
    """A quantized cache's scales, measured on the same model.

    A model with a plain cache is kept until the cost is known.
    """
    bits = BITS.get(kv_cache or aim.precision)
    if bits is None:
        return None
    assert study is not None, "whoever asks for a quantized cache says how its scales are found"
    plain, files = folder / _PLAIN, files_of(aim, checkpoint)
    plain.mkdir()
    hashes, _ = write_graph(checkpoint, plain, aim, files, progress)
    _write_sidecars(checkpoint, plain, aim, files, len(hashes))
    return QuantizedCache(bits, study[0](plain, bits))


def _cost_of(cache: QuantizedCache | None, folder: Path, study: StudyCache | None, kv_cache: str) -> dict[str, Any]:
    """The cache's type and, where it is quantized, what that costs."""
    if cache is None or study is None:
        return {"kv_cache": kv_cache}
    cost = study[1](folder / _PLAIN, folder)
    shutil.rmtree(folder / _PLAIN)
    return {"kv_cache": kv_cache, **cost}


def _described(cache: QuantizedCache | None) -> dict[str, Any]:
    """A quantized cache's scales for the manifest, `[kv_heads][head_dim]` per layer."""
    if cache is None:
        return {}
    return {"kv_cache_scales": [{"key": k[:, 0].tolist(), "value": v[:, 0].tolist()} for k, v in cache.scales]}


def write_graph(
    checkpoint: Checkpoint,
    folder: Path,
    target: Target,
    files: Files,
    progress: Progress,
    cache: QuantizedCache | None = None,
) -> tuple[Mapping[str, GrowingHash], dict[str, Any]]:
    """Write the graph and its data.

    Returns the data files' hashes by name, and which operators the experts became.
    """
    dtype, is_ort = TYPES[target.precision], target.flavor == "ort"
    opset = target.opset or (ort_ops.OPSET if is_ort else standard_ops.OPSET)
    with GraphBuilder(folder, opset, files) as graph:
        ops = (
            ort_ops.OrtOps(graph, dtype, target.accuracy_level, cache, target.kernels)
            if is_ort
            else standard_ops.StandardOps(graph, dtype, target.accuracy_level, target.flavor == "tensorrt", opset)
        )
        build_decoder(ops, checkpoint, progress)
        context = str(context_length(checkpoint.config))
        graph.save({"qwen3_export.flavor": target.flavor, "qwen3_export.context": context})
    sparse = {"expert_layers": _expert_layers(ops, checkpoint, progress)} if checkpoint.config.sparse_layers else {}
    return graph.hashes, sparse


def _expert_layers(
    ops: ort_ops.OrtOps | standard_ops.StandardOps, checkpoint: Checkpoint, progress: Progress
) -> list[dict[str, Any]]:
    found = experts.expressions(experts.sparse_layers(checkpoint), ops.not_fused)
    for item in found:
        if item["reason"] and isinstance(ops, ort_ops.OrtOps):
            progress.warn(
                f"experts of {len(item['layers'])} layers run as a slower {item['operator']}: {item['reason']}"
            )
    return found
