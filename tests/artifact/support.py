"""Helpers of the artifact tests: logits, KL, and independent readers of our files.

Nothing here imports `qwen3_export.core.pack` or `ship`: codes are read by the format's own Python library, or by bit
operations after the format's specification.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.recipe import Recipe, Rule
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from tests.conftest import tiny_config, write_checkpoint

# Tolerance for two runtimes that sum the same fp32 products in another order. The largest difference seen was 2.5e-5,
# on logits up to 20.
SAME = 1e-4
# One thread, since threads that wait for each other are slow on a busy machine.
THREADS = 1
# A tiny model with the reference model's tokenizer needs its vocabulary.
VOCABULARY = 8192
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TINY: dict[str, dict[str, Any]] = {
    "tied, 4 heads of 32 on 64": {},
    "untied": {"tie_word_embeddings": False},
    "8 heads of 16": {"num_attention_heads": 8, "head_dim": 16},
    "4 heads of 128": {"head_dim": 128},
    "one key/value head": {"num_key_value_heads": 1},
    "yarn": {"rope_scaling": YARN},
    "yarn, 5.x spelling": {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
    "yarn, attention_factor 1.25": {"rope_scaling": {**YARN, "attention_factor": 1.25}},
}


@dataclass(frozen=True)
class Exported:
    """An artifact, the result of its export, and its source."""

    path: Path
    result: dict[str, Any]
    source: Checkpoint

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return self.source.config.all_linears()


OnnxFolder = Callable[..., Exported]
GgufFile = Callable[..., Exported]


def logits(artifact: Path, rows: Sequence[NDArray], exact: bool = False) -> list[NDArray[np.float32]]:
    """Logits of every position of every row, in the artifact's own runtime."""
    session = open_session(artifact, RuntimeOptions(threads=THREADS, exact=exact))
    try:
        return [session.prefill(ids) for ids in rows]
    finally:
        session.close()


def largest_difference(a: Sequence[NDArray], b: Sequence[NDArray]) -> float:
    assert [x.shape for x in a] == [y.shape for y in b]
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def mean_kl(truth: Sequence[NDArray], other: Sequence[NDArray]) -> float:
    """Mean KL(truth ‖ other) per position, from logits, in fp64."""
    p, q = (_log_softmax(np.concatenate(rows).astype(np.float64)) for rows in (truth, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(x: NDArray) -> NDArray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_ids(count: int, vocabulary: int = 320, seed: int = 7) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).astype(np.int32)


# Models


def round_to_nearest(source: Path, output: Path, *rules: tuple[str, QuantScheme | None]) -> Checkpoint:
    """Quantize a folder by rounding, which needs tokenizer and calibration for scales of inputs alone."""
    from qwen3_export.solve.job import QuantizeSettings
    from qwen3_export.solve.quantize import quantize

    recipe = Recipe("rounded", "rtn", tuple(Rule(match, scheme) for match, scheme in rules))
    settings = QuantizeSettings(threads=THREADS, samples=2, sequence_length=64)
    quantize(open_checkpoint(source), recipe, output, settings)
    return open_checkpoint(output)


def with_tokenizer(folder: Path, reference_folder: Path) -> Path:
    """Give a checkpoint folder the reference model's tokenizer and generation settings."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(reference_folder / name, folder)
    return folder


def tiny_with_tokenizer(folder: Path, reference_folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A random model with a tokenizer, without which llama.cpp cannot load it."""
    config = {**(config or tiny_config()), "vocab_size": VOCABULARY}
    return with_tokenizer(write_checkpoint(folder, config), reference_folder)


# ONNX


def load_graph(folder: Path) -> onnx.ModelProto:
    """The graph alone; weights stay on the disk."""
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


class OnnxWeights:
    """A graph's nodes by name, and their constant inputs read by the onnx library."""

    def __init__(self, folder: Path) -> None:
        self.model = onnx.load(str(folder / "model.onnx"))
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._nodes = {node.name: node for node in self.model.graph.node}

    def node(self, name: str) -> onnx.NodeProto:
        return self._nodes[name]

    def inputs(self, node: str) -> list[NDArray | None]:
        """A node's inputs; None for one that is no constant."""
        tensors = [self._tensors.get(name) for name in self._nodes[node].input]
        return [None if tensor is None else onnx.numpy_helper.to_array(tensor) for tensor in tensors]

    def attributes(self, node: str) -> dict[str, Any]:
        return {item.name: onnx.helper.get_attribute_value(item) for item in self._nodes[node].attribute}


def graph_name(module: str) -> str:
    """`model.layers.3.mlp.up_proj` → `layer.3.mlp.up_proj`, a node's name."""
    return module.replace("model.layers.", "layer.")


def low_bits_first(blob: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Codes `[first axis, count]`, unpacked lowest bits first, other axes flattened."""
    parts = [(blob >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(blob), -1)[:, :count]


# GGUF


def gguf_tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def gguf_fields(path: Path) -> dict[str, Any]:
    """`{key: value}` in the file's order, GGUF's own header left out; long arrays by length."""
    values = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    return {
        name: len(value) if isinstance(value, list) else value
        for name, value in values.items()
        if not name.startswith("GGUF.")
    }


def gguf_name(module: str) -> str:
    """llama.cpp's name of a linear: `model.layers.3.mlp.up_proj` → `blk.3.ffn_up.weight`."""
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts = module.split(".")
    return f"blk.{parts[2]}.{names.get(parts[-1], 'ffn_' + parts[-1].removesuffix('_proj'))}.weight"


@dataclass(frozen=True)
class Blocks:
    """A ggml tensor: unsigned codes `[out, in]`, scales and minimums `[out, in / 32]`."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    minimums: NDArray[np.float16] | None


def read_blocks(data: NDArray[np.uint8], kind: Type) -> Blocks:
    """Take a ggml tensor's blocks apart, after ggml-common.h: `block_q4_0`, `block_q4_1`, `block_q8_0`."""
    rows, size = len(data), {Type.Q4_0: 18, Type.Q4_1: 20, Type.Q8_0: 34}[kind]
    raw = data.reshape(rows, -1, size)
    halves = np.ascontiguousarray(raw[..., :4]).view(np.float16)
    scales, minimums = halves[..., 0], halves[..., 1] if kind == Type.Q4_1 else None
    if kind == Type.Q8_0:
        codes = (np.ascontiguousarray(raw[..., 2:]).view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    else:
        nibbles = raw[..., size - 16 :]
        codes = np.concatenate([nibbles % 16, nibbles // 16], -1)
    return Blocks(codes.reshape(rows, -1), scales, minimums)


def expand_to_f32(path: Path, output: Path) -> Path:
    """Rewrite a GGUF file with fp32 tensors, so that llama.cpp computes in fp32.

    With other weight types it rounds activations too (to 8 bits for Q4_0 and Q8_0), which would hide small errors of
    the file.
    """
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output
