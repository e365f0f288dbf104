"""Whether a server could start an artifact: its kernels, graph and tokenizer."""

from __future__ import annotations

from pathlib import Path

from qwen3_export.core.onnx_header import read_onnx_header
from qwen3_export.errors import InputError
from qwen3_export.preflight.runtimes import check_served
from qwen3_export.run.onnx_files import find_onnx
from qwen3_export.run.signature import why_no_decoder
from qwen3_export.text.tokenizer import ModelTokenizer


def check_startable(kind: str, artifact: Path) -> None:
    """Raise what a server would say of an artifact that cannot answer.

    `kind` is that of `ship.triton.artifact`. No weights are read.
    """
    if kind == "vllm":
        check_served(artifact)
    if kind == "onnx":
        graph = find_onnx(artifact).graph
        if reason := why_no_decoder(graph, read_onnx_header(graph)):
            raise InputError(f"{graph}: {reason}", "give the folder of a decoder with a key/value cache")
    if artifact.is_dir():
        ModelTokenizer(artifact)
