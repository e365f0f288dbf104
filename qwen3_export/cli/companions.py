"""`inspect` for the files that accompany artifacts; needs no torch.

These are reference files, importance matrices, reports, Triton repositories, recipes and the demo's folder.
`show_companions` prints what is found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qwen3_export.core.files import open_regular, read_object, read_text
from qwen3_export.core.imatrix import read_imatrix
from qwen3_export.core.manifest import MANIFEST, read_manifest
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.tensorfile import TensorFile
from qwen3_export.errors import InputError

Kind = TypeVar("Kind")
REPORT = "report.json"
_OURS, _FOREIGN = "qwen3-export", "another tool"
_KNOWN = (
    "inspect knows checkpoint, ONNX, TensorRT, report and Triton folders, .onnx and .gguf files, reference files, "
    "importance matrices and recipes"
)
_PARAMETER = re.compile(r'key: *"(\w+)" *,? *value *:? *\{ *string_value: *"([^"]*)"')
_BACKEND, _COUNT = re.compile(r'^ *(?:backend|platform): *"([^"]*)"', re.MULTILINE), re.compile(r"\bcount: *(\d+)")


def describer(path: Path) -> Callable[[Path], dict[str, Any]] | None:
    """The function that describes a path; None for an artifact or a checkpoint."""
    if path.is_dir():
        return _of_folder(path)
    if path.suffix in (".yaml", ".yml"):
        return _recipe
    if path.name == REPORT:
        return _report
    if path.suffix == ".onnx":
        return None
    return _of_bytes(path)


def _of_folder(path: Path) -> Callable[[Path], dict[str, Any]] | None:
    if (path / "config.json").is_file():
        return None
    if (path / REPORT).is_file():
        return _report
    if any(path.glob("*/config.pbtxt")):
        return _triton
    return _demo if read_manifest(path).get("kind") == "demo" else None


def _of_bytes(path: Path) -> Callable[[Path], dict[str, Any]] | None:
    """The function that describes a file, chosen by its first bytes; None for GGUF."""
    try:
        with open_regular(path) as file:
            head = file.read(9)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head[:4] == b"GGUF" or path.suffix == ".gguf":
        return None
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return _reference
    return _older_imatrix


def _reference(path: Path) -> dict[str, Any]:
    from qwen3_export.prove.reference import ReferenceFile

    file = TensorFile(path)
    metadata, drawn = file.metadata, file.entries.get("tail_ids")
    if not metadata.get("format", "").startswith("qwen3-export reference"):
        raise InputError(f"{path}: one file of a checkpoint, no reference file", "give the checkpoint's folder")
    found = ReferenceFile(path)
    domains: dict[str, int] = {}
    for ids, domain in zip(found.samples.ids, found.samples.domains, strict=True):
        domains[domain] = domains.get(domain, 0) + len(ids) - 1
    tasks, chats = json.loads(metadata.get("tasks") or "null"), found.chats
    right = _as(tasks.get("right"), list) or [] if isinstance(tasks, dict) else []
    return {
        "artifact": str(path),
        "kind": "reference",
        "bytes": path.stat().st_size,
        "source": metadata.get("source"),
        "source_sha256": found.source_sha256,
        "vocab_size": found.vocab_size,
        "rows": len(found.samples.ids),
        "tokens": found.samples.tokens,
        "positions": sum(domains.values()),
        "domains": domains,
        "text_sha256": found.samples.sha256,
        "top_k": int(metadata["top_k"]),
        "drawn": drawn.shape[1] if drawn else 0,
        "kl_is_lower_bound": found.is_lower_bound,
        "texts": len(found.continuations.prompts),
        "chats": 0 if chats is None else sum(len(rows) for rows in chats.answers.values()),
        "thinking_budget": chats.budget.tokens if chats and chats.budget else None,
        "sidecars": found.sidecars is not None,
        "tasks": len(right),
        "tasks_right": sum(map(bool, right)),
    }


def describe_imatrix(path: Path) -> dict[str, Any]:
    """An importance matrix in either form."""
    with open_regular(path) as file:
        is_gguf = file.read(4) == b"GGUF"
    found = read_imatrix(path)
    for name, entry in found.entries.items():
        if not np.isfinite(entry.counts).all() or not entry.counts.size:
            raise InputError(f"{path}: {name} does not say how many tokens it saw", "measure it again")
    return {
        "artifact": str(path),
        "kind": "importance matrix",
        "form": "GGUF" if is_gguf else "older form",
        "bytes": path.stat().st_size,
        "datasets": list(found.datasets),
        "samples": found.chunks,
        "sequence_length": found.chunk_size or None,
        "provenance": {"written by": _OURS if found.provenance else _FOREIGN, **found.provenance},
        "tensors": [
            {
                "name": name,
                "shape": list(entry.sums.shape),
                "fewest": float(entry.counts.min()),
                "most": float(entry.counts.max()),
            }
            for name, entry in found.entries.items()
        ],
    }


def _older_imatrix(path: Path) -> dict[str, Any]:
    try:
        return describe_imatrix(path)
    except InputError as error:
        raise InputError(f"{path}: nothing that inspect knows", _KNOWN) from error


def _report(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    values = read_object(folder / REPORT)
    items = next((values[key] for key in ("results", "pairs", "candidates") if isinstance(values.get(key), list)), None)
    if items is None or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{folder / REPORT}: no report of qwen3-export", "--report of validate or bench writes one")
    failed = [item for item in _as(values.get("failed"), list) or () if isinstance(item, dict)]
    return {
        "artifact": str(path),
        "kind": "report",
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
        "title": _as(read_manifest(folder).get("title"), str) if (folder / MANIFEST).is_file() else None,
        "artifacts": list({(one["artifact"], one["node"]): one for one in map(_measured, [*failed, *items])}.values()),
        "passed": _as(values.get("passed"), bool),
        "verdict": _as(values.get("verdict"), str),
        "environment": _as(values.get("environment"), dict),
    }


def _measured(item: dict[str, Any]) -> dict[str, Any]:
    """One artifact's figures in a report; None where one was not measured."""
    decode = item.get("decode")
    speed = decode.get("tokens_per_second_p50") if isinstance(decode, dict) else item.get("tokens_per_second")
    node = _as(item.get("node"), dict) or {}
    return {
        "artifact": str(item.get("artifact")),
        "node": _as(node.get("label"), str) or _as(node.get("name"), str),
        "runtime": _as(item.get("runtime"), str),
        "kl_mean": _number(item.get("kl_mean")),
        "kl_estimate": _as(item.get("kl_estimate"), dict),
        "kl_is_lower_bound": _as(item.get("kl_is_lower_bound"), bool),
        "bytes": _as(item.get("bytes"), int),
        "tokens_per_second": _number(speed),
        "error": _as(item.get("error"), str),
    }


def _as(value: Any, kind: type[Kind]) -> Kind | None:
    """A value from a file, None when it has another type than expected."""
    return value if type(value) is kind else None


def _number(value: Any) -> float | None:
    """A number from a file, None for anything else."""
    return float(value) if type(value) in (int, float) and np.isfinite(value) else None


def _triton(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    models = []
    for config in sorted(path.glob("*/config.pbtxt")):
        text = read_text(config)
        backend, count = _BACKEND.search(text), _COUNT.search(text)
        models.append(
            {
                "name": config.parent.name,
                "backend": backend[1] if backend else None,
                "instances": int(count[1]) if count else 1,
                "parameters": dict(_PARAMETER.findall(text)),
                "bytes": _bytes_below(config.parent),
            }
        )
    return {
        "artifact": str(path),
        "kind": "Triton repository",
        "bytes": _bytes_below(path),
        "models": models,
        "provenance": {
            "written by": _OURS if manifest else _FOREIGN,
            **{key: manifest[key] for key in ("artifact", "source", "quantized") if key in manifest},
        },
    }


def _demo(path: Path) -> dict[str, Any]:
    listed = _as(read_manifest(path).get("artifacts"), list) or []
    return {"artifact": str(path), "kind": "demo", "bytes": _bytes_below(path), "artifacts": list(map(str, listed))}


def _recipe(path: Path) -> dict[str, Any]:
    recipe = load_recipe(str(path)).to_dict()
    return {"artifact": str(path), "kind": "recipe", "bytes": path.stat().st_size, "recipe": recipe}


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
