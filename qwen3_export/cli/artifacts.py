"""`inspect` for ONNX, GGUF and TensorRT artifacts; needs neither torch nor onnx."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_export.cli.companions import describe_imatrix, describer
from qwen3_export.cli.console import fields, size, table
from qwen3_export.cli.show_companions import show_companion
from qwen3_export.core.gguf_header import GgufTensor, gguf_kind, read_gguf_header
from qwen3_export.core.gguf_types import CONVERTERS_TYPES
from qwen3_export.core.manifest import MANIFEST, read_manifest
from qwen3_export.core.onnx_header import OnnxHeader, OnnxTensor, onnx_data_files, read_onnx_header
from qwen3_export.core.plan_folder import ENGINE, PLAN, read_engine, why_damaged
from qwen3_export.run.onnx_files import find_onnx, is_onnx
from qwen3_export.run.signature import why_no_decoder

_SHOWN_VALUES = ("general.architecture", "general.name", "general.file_type", "general.quantized_by", "general.license")
_STATED = (
    "version", "target", "flavor", "precision", "accuracy_level", "added_kl", "kv_cache", "kv_cache_kl", "exact",
    "expert_layers", "source", "quantized",
)  # fmt: skip
_OURS, _FOREIGN = "qwen3-export", "another tool"
# Of a file that the converter, and whoever else writes the same bytes, would not sign.
_UNNAMED = "llama.cpp's converter, or qwen3-export, whose files of these types are the same"


def is_artifact(path: Path) -> bool:
    """Whether a path goes to `describe_artifact`: any file, and folders without a checkpoint."""
    return path.is_file() or (path.is_dir() and (is_onnx(path) or describer(path) is not None))


def describe_artifact(path: Path) -> dict[str, Any]:
    """Types, sizes and provenance of an artifact; InputError for any other file.

    A plan is described with the folder that it lies in.
    """
    if path.name == PLAN and (path.parent / ENGINE).is_file():
        return _onnx(path.parent)
    found = describer(path)
    if found:
        return found(path)
    return _onnx(path) if is_onnx(path) else _gguf(path)


def show_artifact(values: dict[str, Any]) -> None:
    """Print a table of types and one of tensors, all layers in one row."""
    if "types" not in values:
        show_companion(values)
        return
    single = {key: value for key, value in values.items() if not isinstance(value, dict | list)}
    counted = {key: values.get(key, {}) for key in ("operators", "opsets")}
    lists = {key: ", ".join(f"{a} ({b})" for a, b in items.items()) for key, items in counted.items() if items}
    provenance = {key: _plain(value) for key, value in _flat(values["provenance"]).items() if value not in (None, [])}
    fields({**single, **lists, **provenance, "size": size(values["bytes"])})
    rows = [[name, str(item["tensors"]), size(item["bytes"])] for name, item in values["types"].items()]
    table(["type", "tensors", "size"], rows)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tensor in values["tensors"]:
        groups.setdefault((re.sub(r"\d+", "*", tensor["name"]), tensor["type"]), []).append(tensor)
    rows = []
    for (name, kind), items in groups.items():
        shape = " × ".join(map(str, items[0]["shape"])) or "1"
        rows.append([name, str(len(items)), kind, shape, size(sum(item["bytes"] for item in items))])
    table(["tensor", "count", "type", "shape of the first", "size"], rows)


def _flat(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance with a line for everything that is known of a plan.

    Its build command, which has thousands of characters, is in --json alone.
    """
    engine = {key: value for key, value in provenance.get("engine", {}).items() if key not in ("engine", "trtexec")}
    named = {"engine": provenance["engine"].get("engine")} if "engine" in provenance else {}
    return {**provenance, **named, **{f"engine.{key}": value for key, value in engine.items()}}


def _plain(value: Any) -> Any:
    """A value as one line of text."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value) if isinstance(value, dict | list) else value


def _onnx(path: Path) -> dict[str, Any]:
    files = find_onnx(path)
    header = read_onnx_header(files.graph)
    manifest = read_manifest(files.folder) if (files.folder / MANIFEST).is_file() else {}
    engine, built = files.folder / ENGINE, files.folder / PLAN
    plan = {"engine": read_engine(files.folder)} if engine.is_file() else {}
    stated = {key: manifest[key] for key in _STATED if key in manifest}
    parts = [files.graph, *onnx_data_files(files.graph), *([built] if plan and built.is_file() else [])]
    return {
        "artifact": str(path),
        "kind": "TensorRT" if plan else "ONNX",
        "graph": files.graph.name,
        **({"plan": _built(built)} if plan else {}),
        "bytes": sum(file.stat().st_size for file in parts),
        "files": {file.name: file.stat().st_size for file in parts},
        **_lacking(files.graph, header),
        "opsets": header.opsets,
        "inputs": header.inputs,
        "outputs": header.outputs,
        "operators": header.operators,
        "provenance": {
            "written by": _OURS if manifest else header.producer or _FOREIGN,
            **stated,
            **header.metadata,
            **plan,
        },
        **_tensors(header.tensors),
    }


def _lacking(graph: Path, header: OnnxHeader) -> dict[str, Any]:
    """Missing data files, and why the graph is no decoder, if so."""
    named = {tensor.file for tensor in header.tensors if tensor.file}
    missing = sorted(name for name in named if not (graph.parent / name).is_file())
    reason = why_no_decoder(graph, header)
    return {**({"missing files": missing} if missing else {}), **({"no decoder": reason} if reason else {})}


def _built(plan: Path) -> str:
    """A plan's file, size and damage, or that it has to be built."""
    if plan.is_file():
        reason = why_damaged(plan.parent)
        return f"{plan.name}, {size(plan.stat().st_size)}" + (f", damaged: {reason}" if reason else "")
    return f"not built yet: trtexec in {ENGINE} is the command, for this folder on the plan's device"


def _gguf(path: Path) -> dict[str, Any]:
    # A matrix is one file, whatever its name.
    if gguf_kind(path) == "imatrix":
        return describe_imatrix(path)
    header = read_gguf_header(path)
    ours = {key.removeprefix("qwen3_export."): value for key, value in header.values.items() if "qwen3_export." in key}
    plain = {tensor.type for tensor in header.tensors} <= set(CONVERTERS_TYPES)
    return {
        "artifact": str(path),
        "kind": "GGUF",
        **({"shard": _shard(header.files, path)} if len(header.files) > 1 else {}),
        **({"truncated": header.truncated} if header.truncated else {}),
        "bytes": sum(file.stat().st_size for file in header.files),
        "files": {file.name: file.stat().st_size for file in header.files},
        "values": header.values,
        "provenance": {
            "written by": _OURS if ours else _UNNAMED if plain and len(header.files) == 1 else _FOREIGN,
            **{key: header.values[key] for key in _SHOWN_VALUES if key in header.values},
            **ours,
        },
        **_tensors(header.tensors),
    }


def _shard(files: Sequence[Path], path: Path) -> str:
    """Which of a split model's files was named; all are described."""
    return f"{[file.name for file in files].index(path.name) + 1} of {len(files)}, all of which are described"


def _tensors(found: Iterable[OnnxTensor | GgufTensor]) -> dict[str, Any]:
    """Every tensor, and the totals per type."""
    types: dict[str, dict[str, int]] = {}
    tensors = []
    for tensor in found:
        total = types.setdefault(tensor.type, {"tensors": 0, "bytes": 0})
        total["tensors"] += 1
        total["bytes"] += tensor.bytes
        tensors.append({"name": tensor.name, "type": tensor.type, "shape": list(tensor.shape), "bytes": tensor.bytes})
    return {"types": types, "tensors": tensors}
