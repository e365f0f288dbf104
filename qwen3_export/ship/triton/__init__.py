"""Triton Inference Server: a model repository that generates text from an artifact.

    REPO/NAME/config.pbtxt        inputs, outputs, instances and the queue's bound
    REPO/NAME/1/model.py          the python backend's code
    REPO/NAME/1/qwen3_export/     the part of this package that runs artifacts
    REPO/NAME/1/artifact…         the ONNX folder, GGUF file (all parts) or TensorRT folder, tokenizer inside

    REPO/NAME/1/model.json        of a quantized folder instead: engine arguments for Triton's vllm backend
    REPO/NAME/1/model/            the folder

The repository starts in tritonserver as it is, where the server's Python has the libraries that `REQUIREMENTS` names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3_export.core.gguf_header import read_gguf_header
from qwen3_export.core.manifest import file_list, read_manifest, sha256_file, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.core.text_files import template_warning
from qwen3_export.errors import InputError
from qwen3_export.ship.triton.artifact import Kind, kind_of
from qwen3_export.ship.triton.config import Serving, python_config, vllm_config

# Answers that one copy decodes together in ONNX Runtime, where nothing else is asked for.
SEQUENCES = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Bytes of a folder's name on Linux.
_LONGEST_NAME = 255
_PACKAGE = Path(__file__).resolve().parents[2]
_SERVED = ("__init__.py", "api.py", "errors.py", "result.py", "core", "text", "run")


def _origin_of_folder(artifact: Path) -> dict[str, Any]:
    """What a folder's manifest says of its source."""
    return {key: value for key, value in read_manifest(artifact).items() if key in ("source", "quantized", "recipe")}


def _origin_of_file(kind: Kind) -> dict[str, Any]:
    """What a GGUF file says of its source, and its own hash.

    Parts of a split model are hashed as one file.
    """
    files = [file for file, _ in kind.parts]
    values = read_gguf_header(files[0]).values
    origin: dict[str, Any] = {"artifact_sha256": sha256_file(*files)}
    if source := values.get("qwen3_export.source.sha256"):
        origin["source"] = {"name": str(values.get("general.name")), "sha256": str(source)}
        origin["quantized"] = {"recipe": str(values.get("qwen3_export.recipe"))}
    return origin


def export_triton(
    artifact: Path,
    output: Path,
    name: str = "qwen3",
    serving: Serving | None = None,
    mount: str = "/models",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a repository with one model called `name`; returns the result that `--json` prints.

    `mount` is the folder under which the server will see the repository; only vLLM needs to know it.
    Raises InputError for an artifact or a name that cannot be served.
    """
    started, progress, serving = time.monotonic(), progress or Progress(), serving or Serving()
    _check_options(name, mount)
    kind = kind_of(artifact)
    _check_files(artifact)
    if artifact.is_dir() and (warning := template_warning(artifact, artifact.name)) is not None:
        progress.warn(warning)
    with staged_folder(output, force, [artifact]) as folder:
        version = folder / name / "1"
        version.mkdir(parents=True)
        progress.log(f"copying {artifact}")
        _copy(artifact, kind, version)
        if kind.name == "vllm":
            text = vllm_config(name)
            engine = {"model": f"{mount.rstrip('/')}/{name}/1/{kind.place}", "disable_log_stats": True}
            (version / "model.json").write_text(json.dumps(engine, indent=2) + "\n")
        else:
            text = python_config(name, kind.place, serving, _sequences(kind, serving, progress), kind.device)
            shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
            _copy_package(version / "qwen3_export")
        (folder / name / "config.pbtxt").write_text(text)
        origin = _origin_of_file(kind) if kind.parts else _origin_of_folder(artifact)
        values = {
            "model": name,
            "artifact": kind.parts[0][0].name if kind.parts else artifact.name,
            "backend": kind.name,
            "requirements": kind.requirements,
        }
        write_manifest(folder, "triton", {**values, **origin})
        files = file_list(folder)
    return {
        "output": str(output),
        "model": name,
        "backend": "vllm" if kind.name == "vllm" else "python",
        "requirements": kind.requirements,
        "start": f"tritonserver --model-repository={output.resolve()}",
        "files": files,
        "seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _check_options(name: str, mount: str) -> None:
    """Refuse a name that no folder can have, and a relative mount."""
    if not _NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: letters, digits, '.', '_' and '-' were expected")
    if len(name) > _LONGEST_NAME:
        raise InputError(f"--name: {len(name)} letters; it names a folder, which takes {_LONGEST_NAME} at most")
    if not mount.startswith("/"):
        # vLLM would take a relative path for a model's id on the hub.
        raise InputError(f"--mount {mount!r}: an absolute path such as /models was expected")


def _sequences(kind: Kind, serving: Serving, progress: Progress) -> int:
    """Answers that one copy decodes together: one, unless ONNX Runtime runs it."""
    if kind.name == "onnx":
        return serving.sequences or SEQUENCES
    if serving.sequences not in (None, 1):
        named = "GGUF files" if kind.name == "gguf" else "TensorRT plans"
        progress.warn(f"--sequences {serving.sequences} has no effect: answers of {named} are decoded one at a time")
    return 1


def _check_files(artifact: Path) -> None:
    """Raise InputError for devices, pipes and links to folders.

    Copying them might never end.
    """
    for place, folders, files in os.walk(artifact):
        for name in folders:
            if (path := Path(place, name)).is_symlink():
                raise InputError(f"{path} is a link to a folder", "put the folder in its place")
        for name in files:
            if not (path := Path(place, name)).is_file():
                raise InputError(f"{path} is no regular file", "copy the artifact again")


def _copy(artifact: Path, kind: Kind, version: Path) -> None:
    """A folder, or the files of a GGUF model; links are followed."""
    for file, name in kind.parts:
        shutil.copyfile(file, version / name)
    if not kind.parts:
        shutil.copytree(artifact, version / kind.place, copy_function=shutil.copyfile)


def _copy_package(target: Path) -> None:
    """The modules that load and run an artifact, without caches and lint settings."""
    ignored: Callable[..., set[str]] = shutil.ignore_patterns("__pycache__", "ruff.toml", "*.pyc", ".*")
    target.mkdir()
    for name in _SERVED:
        source = _PACKAGE / name
        if source.is_file():
            shutil.copyfile(source, target / name)
        else:
            shutil.copytree(source, target / name, ignore=ignored, copy_function=shutil.copyfile)
