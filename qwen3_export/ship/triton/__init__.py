"""Triton Inference Server: a model repository that generates text from an artifact.

    REPO/NAME/config.pbtxt        inputs, outputs, instances and the queue's bound
    REPO/NAME/1/model.py          the python backend's code
    REPO/NAME/1/qwen3_export/     the part of this package that runs artifacts
    REPO/NAME/1/artifact…         the ONNX folder, GGUF file or TensorRT folder, tokenizer inside

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_object
from qwen3_export.core.gguf_header import read_gguf_header
from qwen3_export.core.manifest import file_list, read_manifest, sha256_file, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.errors import InputError
from qwen3_export.ship.triton.config import Serving, python_config, vllm_config

# Answers that one copy decodes together in ONNX Runtime, where nothing else is asked for.
SEQUENCES = 8
# What the server's Python needs, by the kind of artifact. A plan's library comes last: its version is added.
REQUIREMENTS = {
    "onnx": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML onnxruntime",
    "gguf": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML xllamacpp==2026.10.11549",
    "rtx": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML tensorrt-rtx",
    "trt": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML tensorrt",
    "vllm": "vllm",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Bytes of a folder's name on Linux.
_LONGEST_NAME = 255
_PACKAGE = Path(__file__).resolve().parents[2]
_SERVED = ("__init__.py", "api.py", "errors.py", "result.py", "core", "text", "run")


@dataclass(frozen=True)
class Kind:
    """What is served, and under which name it lies in the repository.

    `device` is what the runner is asked for; `requirements` are what the server's Python needs.
    """

    name: str
    place: str
    requirements: str
    device: str | None = None


def kind_of(artifact: Path) -> Kind:
    """ONNX folder, GGUF file, TensorRT folder, or a folder for vLLM.

    Raises InputError for what is none.
    """
    hint = "give a .gguf file, an ONNX folder, a TensorRT folder or a quantized folder"
    if artifact.is_file():
        with artifact.open("rb") as file:
            if file.read(4) == b"GGUF":
                return Kind("gguf", "artifact.gguf", REQUIREMENTS["gguf"])
        raise InputError(f"{artifact}: not a GGUF file", hint)
    if (artifact / "engine.json").is_file():
        return _plan(artifact)
    if (artifact / "model.onnx").is_file():
        return Kind("onnx", "artifact", REQUIREMENTS["onnx"])
    if (artifact / "config.json").is_file() and any(artifact.glob("*.safetensors")):
        return Kind("vllm", "model", REQUIREMENTS["vllm"])
    if any(artifact.glob("onnx/*.onnx")):
        raise InputError(f"{artifact}: a folder for browsers, which no server runs", "export it with --target cpu")
    raise InputError(f"{artifact}: no such artifact", hint)


def _origin_of_folder(artifact: Path) -> dict[str, Any]:
    """What a folder's manifest says of its source."""
    return {key: value for key, value in read_manifest(artifact).items() if key in ("source", "quantized", "recipe")}


def _origin_of_file(artifact: Path) -> dict[str, Any]:
    """What a GGUF file says of its source, and its own hash."""
    values = read_gguf_header(artifact).values
    origin: dict[str, Any] = {"artifact_sha256": sha256_file(artifact)}
    if source := values.get("qwen3_export.source.sha256"):
        origin["source"] = {"name": str(values.get("general.name")), "sha256": str(source)}
        origin["quantized"] = {"recipe": str(values.get("qwen3_export.recipe"))}
    return origin


def _plan(artifact: Path) -> Kind:
    """A TensorRT folder, which is served by its plan alone.

    Where that cannot run, the server refuses the model.
    """
    described = read_object(artifact / "engine.json", hint="export the folder again")
    if not (artifact / "model.plan").is_file() or described.get("engine") not in REQUIREMENTS:
        hint = "in that folder, on its device, run the command that stands under trtexec in engine.json"
        raise InputError(
            f"{artifact}: its plan has not been built", hint if "trtexec" in described else "export the folder again"
        )
    needed, version = REQUIREMENTS[described["engine"]], described.get("version")
    # The version of a plan that was built elsewhere is not known here: whoever built it has it installed.
    return Kind(described["engine"], "artifact", f"{needed}=={version}" if version else needed, device="plan")


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
    with staged_folder(output, force, [artifact]) as folder:
        version = folder / name / "1"
        version.mkdir(parents=True)
        progress.log(f"copying {artifact}")
        _copy(artifact, version / kind.place)
        if kind.name == "vllm":
            text = vllm_config(name)
            engine = {"model": f"{mount.rstrip('/')}/{name}/1/{kind.place}", "disable_log_stats": True}
            (version / "model.json").write_text(json.dumps(engine, indent=2) + "\n")
        else:
            text = python_config(name, kind.place, serving, _sequences(kind, serving, progress), kind.device)
            shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
            _copy_package(version / "qwen3_export")
        (folder / name / "config.pbtxt").write_text(text)
        origin = _origin_of_file(artifact) if artifact.is_file() else _origin_of_folder(artifact)
        values = {"model": name, "artifact": artifact.name, "backend": kind.name, "requirements": kind.requirements}
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


def _copy(source: Path, target: Path) -> None:
    """A file or a folder, links followed."""
    if source.is_file():
        shutil.copyfile(source, target)
    else:
        shutil.copytree(source, target, copy_function=shutil.copyfile)


def _copy_package(target: Path) -> None:
    """The modules that load and run an artifact, without caches and lint settings."""
    ignored: Callable[..., set[str]] = shutil.ignore_patterns("__pycache__", "ruff.toml", "*.pyc")
    target.mkdir()
    for name in _SERVED:
        source = _PACKAGE / name
        if source.is_file():
            shutil.copyfile(source, target / name)
        else:
            shutil.copytree(source, target / name, ignore=ignored, copy_function=shutil.copyfile)
