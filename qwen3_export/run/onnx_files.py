"""Where an ONNX artifact's graph lies, and what its sidecars say.

folder/model.onnx             ours, onnxruntime-genai's builder (or what its genai_config.json names), optimum
folder/onnx/model*.onnx       as transformers.js expects them, below the tokenizer
folder/anything.onnx          when it is the only one, or when the file itself is given
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_sidecar
from qwen3_export.errors import InputError

_USUAL = ("model.onnx", "decoder_model_merged.onnx", "onnx/model.onnx", "onnx/decoder_model_merged.onnx")


@dataclass(frozen=True)
class OnnxFiles:
    """The graph, its folder, and the decoder's part of genai_config.json.

    Tokenizer and configuration are in the folder.
    """

    graph: Path
    folder: Path
    decoder: Mapping[str, Any]
    context: int | None
    shares_cache: bool


def is_onnx(artifact: Path) -> bool:
    """Whether a path is an ONNX file, or a folder of one without safetensors."""
    if artifact.is_file():
        return artifact.suffix == ".onnx"
    return (artifact / "model.onnx").is_file() or (bool(_graphs(artifact)) and not any(artifact.glob("*.safetensors")))


def _graphs(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])


def find_onnx(artifact: Path) -> OnnxFiles:
    """Find the graph; InputError when several are there and none has a usual name."""
    folder = _folder_of(artifact) if artifact.is_file() else _above(artifact)
    genai = read_sidecar(folder / "genai_config.json")
    model = _object(genai, "model")
    graph = artifact if artifact.is_file() else _graph(folder, _object(model, "decoder").get("filename"))
    config = read_sidecar(folder / "config.json")
    decoder = {
        "num_key_value_heads": config.get("num_key_value_heads", config.get("num_attention_heads")),
        "head_size": config.get("head_dim"),
        **_object(model, "decoder"),
    }
    context = model.get("context_length", config.get("max_position_embeddings"))
    shared = bool(_object(genai, "search").get("past_present_share_buffer"))
    return OnnxFiles(graph, folder, decoder, context if type(context) is int else None, shared)


def _folder_of(file: Path) -> Path:
    """The folder of a graph's tokenizer: its own, or the one above `onnx/`."""
    return _above(file.absolute().parent)


def _above(folder: Path) -> Path:
    """The folder of a tokenizer: the one above `onnx/`, or the folder itself."""
    above = folder.absolute().parent
    alone = folder.absolute().name == "onnx" and not (folder / "tokenizer.json").is_file()
    return above if alone and (above / "tokenizer.json").is_file() else folder


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _graph(folder: Path, stated: object) -> Path:
    names = [stated, *_USUAL] if isinstance(stated, str) and Path(stated).name == stated else list(_USUAL)
    for name in names:
        if (folder / str(name)).is_file():
            return folder / str(name)
    found = _graphs(folder)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(str(path.relative_to(folder)) for path in found[:6])
    raise InputError(f"{folder}: several ONNX graphs are in it ({listed})", "give the .onnx file itself")
