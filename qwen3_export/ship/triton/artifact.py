"""What an artifact is to Triton, and its files' names in the repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen3_export.core.genai_config import stated_graph
from qwen3_export.core.gguf_header import GgufHeader, part_name, read_whole_gguf, refuse_no_model
from qwen3_export.core.onnx_header import check_onnx_data
from qwen3_export.core.plan_folder import ENGINE, PLAN, check_plan, read_engine
from qwen3_export.core.tokenizer_files import tokenizer_values
from qwen3_export.errors import InputError

# What the server's Python needs, by the kind of artifact. A plan's library comes last: its version is added.
REQUIREMENTS = {
    "onnx": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML onnxruntime",
    "gguf": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML xllamacpp==2026.10.11549",
    "rtx": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML tensorrt-rtx",
    "trt": "numpy ml_dtypes safetensors tokenizers jinja2 huggingface_hub PyYAML tensorrt",
    "vllm": "vllm",
}
_HINT = "give a .gguf file, an ONNX folder, a TensorRT folder or a quantized folder"


@dataclass(frozen=True)
class Kind:
    """What is served, and under which name it lies in the repository.

    `device` is what the runner is asked for; `requirements` are what the server's Python needs. `parts` are the files
    of a GGUF model, each with its name in the repository.
    """

    name: str
    place: str
    requirements: str
    device: str | None = None
    parts: tuple[tuple[Path, str], ...] = ()


def kind_of(artifact: Path) -> Kind:
    """ONNX folder, GGUF file, TensorRT folder, or a folder for vLLM.

    Headers and sizes are read, no weights. Raises InputError for what is none of them, and for what no server could
    start: a damaged or incomplete one.
    """
    if artifact.is_file():
        with artifact.open("rb") as file:
            if file.read(4) == b"GGUF":
                return _gguf(artifact)
        raise InputError(f"{artifact}: not a GGUF file", _HINT)
    found = _folder(artifact)
    tokenizer_values(artifact)
    return found


def _folder(artifact: Path) -> Kind:
    if (artifact / ENGINE).is_file():
        return _plan(artifact)
    graph = stated_graph(artifact) or artifact / "model.onnx"
    if graph.is_file() and graph.parent != artifact / "onnx":
        check_onnx_data(graph)
        return Kind("onnx", "artifact", REQUIREMENTS["onnx"])
    if (artifact / "config.json").is_file() and any(artifact.glob("*.safetensors")):
        return Kind("vllm", "model", REQUIREMENTS["vllm"])
    if any(artifact.glob("onnx/*.onnx")):
        raise InputError(f"{artifact}: a folder for browsers, which no server runs", "export it with --target cpu")
    raise InputError(f"{artifact}: no such artifact", _HINT)


def _gguf(artifact: Path) -> Kind:
    """A GGUF file, or all parts of a split one, whichever was named."""
    refuse_no_model(artifact)
    header = read_whole_gguf(artifact)
    if reason := _no_model(header):
        raise InputError(f"{artifact}: {reason}", "give the .gguf file of a whole model; `inspect` shows what this is")
    files = header.files
    names = [part_name("artifact", number, len(files)) for number in range(1, len(files) + 1)]
    # llama.cpp finds the parts of a split model by their names.
    parts = tuple(zip(files, names if len(files) > 1 else ["artifact.gguf"], strict=True))
    return Kind("gguf", parts[0][1], REQUIREMENTS["gguf"], parts=parts)


def _no_model(header: GgufHeader) -> str | None:
    """Why a GGUF file is no model, or only a part of one."""
    kind = header.values.get("general.type", "model")
    if kind != "model":
        return f"its general.type is {kind}, no model"
    if not header.tensors:
        return "there are no weights in it"
    if "tokenizer.ggml.tokens" not in header.values:
        return "there is no vocabulary in it"
    return None


def _plan(artifact: Path) -> Kind:
    """A TensorRT folder, which is served by its plan alone.

    Where that cannot run, the server refuses the model.
    """
    described = read_engine(artifact)
    if not (artifact / PLAN).is_file():
        hint = "in that folder, on its device, run the command that stands under trtexec in engine.json"
        raise InputError(
            f"{artifact}: its plan has not been built", hint if "trtexec" in described else "export the folder again"
        )
    check_plan(artifact, whole=True)
    if not (artifact / "model.onnx").is_file():
        raise InputError(f"{artifact / 'model.onnx'}: missing", "copy or export the folder again")
    needed, version = REQUIREMENTS[described["engine"]], described.get("version")
    # The version of a plan that was built elsewhere is not known here: whoever built it has it installed.
    return Kind(described["engine"], "artifact", f"{needed}=={version}" if version else needed, device="plan")
