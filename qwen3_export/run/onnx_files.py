"""Where an ONNX artifact's graph lies, and what its sidecars say.

the file itself               where one is given
folder/ANYTHING               what genai_config.json names: onnxruntime-genai opens no other
folder/model.onnx             ours, onnxruntime-genai's builder, optimum
folder/onnx/model*.onnx       as transformers.js expects them, below the tokenizer
folder/anything.onnx          when it is the only one

Where another graph is opened than genai_config.json names, a warning says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_sidecar
from qwen3_export.core.genai_config import GENAI, inner, read_genai, stated_graph, stated_name
from qwen3_export.errors import InputError, InputWarning

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
    if (artifact / "model.onnx").is_file():
        return True
    return not any(artifact.glob("*.safetensors")) and (bool(_graphs(artifact)) or stated_graph(artifact) is not None)


def _graphs(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])


def find_onnx(artifact: Path) -> OnnxFiles:
    """Find the graph.

    Raises InputError when several are there, none has a usual name, and genai_config.json names none of them.
    """
    folder = _folder_of(artifact) if artifact.is_file() else _above(artifact)
    genai = read_genai(folder)
    graph = artifact if artifact.is_file() else stated_graph(folder, genai) or _graph(folder, genai)
    _warn_of_another(folder, genai, graph)
    config = read_sidecar(folder / "config.json")
    decoder = {
        "num_key_value_heads": config.get("num_key_value_heads", config.get("num_attention_heads")),
        "head_size": config.get("head_dim"),
        **inner(genai, "model", "decoder"),
    }
    context = inner(genai, "model").get("context_length", config.get("max_position_embeddings"))
    shared = bool(inner(genai, "search").get("past_present_share_buffer"))
    return OnnxFiles(graph, folder, decoder, context if type(context) is int else None, shared)


def _warn_of_another(folder: Path, genai: Mapping[str, Any], graph: Path) -> None:
    """Say where genai_config.json names another graph than the one that is opened."""
    name, stated = stated_name(genai), stated_graph(folder, genai)
    if name is None or (stated is not None and stated.samefile(graph)):
        return
    beside = "which is not in the folder" if stated is None else "the graph that onnxruntime-genai opens"
    found = os.path.relpath(graph, folder)
    warnings.warn(
        f"{folder / GENAI}: model.decoder.filename is {name!r:.80}, {beside}; {found} is opened here. To mend it, name "
        f"{found} there" + ("" if stated is None else ", or give the folder"),
        InputWarning,
        stacklevel=3,
    )


def _folder_of(file: Path) -> Path:
    """The folder of a graph's tokenizer: its own, or the one above `onnx/`."""
    return _above(file.absolute().parent)


def _above(folder: Path) -> Path:
    """The folder of a tokenizer: the one above `onnx/`, or the folder itself."""
    above = folder.absolute().parent
    alone = folder.absolute().name == "onnx" and not (folder / "tokenizer.json").is_file()
    return above if alone and (above / "tokenizer.json").is_file() else folder


def _graph(folder: Path, genai: Mapping[str, Any]) -> Path:
    """The graph of a folder whose genai_config.json names none that is there."""
    for usual in _USUAL:
        if (folder / usual).is_file():
            return folder / usual
    found = _graphs(folder)
    if len(found) == 1:
        return found[0]
    listed, name = ", ".join(str(path.relative_to(folder)) for path in found[:6]), stated_name(genai)
    lost = "" if name is None else f", and {GENAI} names {name!r:.80}, which is not"
    raise InputError(f"{folder}: several ONNX graphs are in it ({listed}){lost}", "give the .onnx file itself")
