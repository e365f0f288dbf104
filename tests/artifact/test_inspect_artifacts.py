"""`inspect` of artifacts: compared with what the onnx and gguf libraries read, in a process that has neither."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest

from qwen3_export.core.gguf_header import TYPES as GGUF_TYPES
from qwen3_export.core.gguf_header import read_gguf_header
from qwen3_export.core.onnx_header import onnx_data_files, read_onnx_header
from qwen3_export.errors import InputError
from tests.artifact.support import load_graph

ALONE = """
import sys
for name in ("torch", "onnx", "onnx_ir", "gguf", "onnxruntime", "transformers", "xllamacpp"):
    sys.modules[name] = None
from qwen3_export.cli import main
main()
"""


def inspect(path: Path, *options: str) -> str:
    command = [sys.executable, "-c", ALONE, "inspect", str(path), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def described(path: Path) -> dict[str, Any]:
    return json.loads(inspect(path, "--json"))


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_an_onnx_folder(onnx_folder: Callable, flavor: str) -> None:
    exported = onnx_folder("gptq-w4a16-g128", flavor=flavor)
    values, model = described(exported.path), load_graph(exported.path)
    assert values["bytes"] == sum((exported.path / name).stat().st_size for name in values["files"])
    assert list(values["files"]) == ["model.onnx", "model.onnx.data"]
    wanted = {tensor.name: tensor for tensor in model.graph.initializer}
    assert {item["name"] for item in values["tensors"]} == set(wanted)
    for item in values["tensors"]:
        tensor = wanted[item["name"]]
        assert item["shape"] == list(tensor.dims)
        stored = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        assert item["bytes"] == (stored[0] if stored else len(tensor.raw_data))
    assert sum(group["bytes"] for group in values["types"].values()) == sum(i["bytes"] for i in values["tensors"])
    assert values["operators"] == dict(Counter(f"{n.domain}.{n.op_type}".lstrip(".") for n in model.graph.node))
    assert values["inputs"]["past_key_values.0.key"] == "fp32 [batch_size, 2, past_sequence_length, 128]"
    assert values["outputs"]["logits"] == "fp32 [batch_size, sequence_length, 8192]"
    provenance = values["provenance"]
    assert (provenance["written by"], provenance["flavor"], provenance["exact"]) == ("qwen3-export", flavor, True)
    assert provenance["source"]["name"] == "reference-model"
    assert provenance["quantized"]["recipe"] == "gptq-w4a16-g128"
    text = inspect(exported.path)
    assert ("layer.*.mlp.up_proj.codes" in text) or ("layer.*.mlp.gate_up_proj.codes" in text), text
    assert onnx_data_files(exported.path / "model.onnx") == [exported.path / "model.onnx.data"]


def test_a_graph_of_another_tool(tmp_path: Path) -> None:
    """Weights inside of the graph, in a branch, and among the inputs; every type that the onnx library writes."""
    kinds = [np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_]
    weights = [onnx.numpy_helper.from_array(np.zeros((3, 5), kind), f"w{i}") for i, kind in enumerate(kinds)]
    weights.append(onnx.helper.make_tensor("w4", onnx.TensorProto.INT4, [3, 5], [1] * 15))
    weights.append(onnx.helper.make_tensor("wb", onnx.TensorProto.BFLOAT16, [7], [1.0] * 7))
    inner = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])]
    branches = [
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", [f"inside{i}"], ["y"])],
            "branch",
            [],
            inner,
            [onnx.numpy_helper.from_array(np.zeros(2, np.float32), f"inside{i}")],
        )
        for i in range(2)
    ]
    node = onnx.helper.make_node("If", ["c"], ["out"], then_branch=branches[0], else_branch=branches[1])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.BOOL, []) for n in ("c",)]
    ends.append(onnx.helper.make_tensor_value_info("w0", onnx.TensorProto.FLOAT, [3, 5]))
    out = [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["n"])]
    graph = onnx.helper.make_graph([node], "g", ends, out, weights)
    model = onnx.helper.make_model(graph, producer_name="somebody", producer_version="3")
    onnx.save(model, str(tmp_path / "m.onnx"))
    header = read_onnx_header(tmp_path / "m.onnx")
    found = {tensor.name: tensor for tensor in header.tensors}
    for tensor in weights:
        assert found[tensor.name].shape == tuple(tensor.dims)
        assert found[tensor.name].bytes == len(tensor.raw_data) or tensor.name in ("w4", "wb")
    assert (found["w4"].type, found["w4"].bytes, found["wb"].bytes) == ("int4", 8, 14)
    assert {"inside0", "inside1"} <= set(found)
    assert header.operators == {"If": 1, "Identity": 2}
    assert (header.producer, header.inputs, header.outputs) == ("somebody 3", {"c": "bool []"}, {"out": "fp32 [n]"})
    assert described(tmp_path / "m.onnx")["provenance"]["written by"] == "somebody 3"


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_a_gguf_file(gguf_file: Callable, kind: str) -> None:
    path = gguf_file("original", kind).path
    values, reader = described(path), gguf.GGUFReader(path)
    assert values["bytes"] == path.stat().st_size
    found = {item["name"]: item for item in values["tensors"]}
    assert list(found) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        item = found[tensor.name]
        assert item["type"] == tensor.tensor_type.name.lower()
        assert item["shape"] == [int(size) for size in reversed(tensor.shape)]
        assert item["bytes"] == tensor.n_bytes
    assert values["values"]["general.architecture"] == "qwen3"
    assert values["values"]["tokenizer.ggml.tokens"] == "8192 texts"
    assert values["provenance"]["general.architecture"] == "qwen3"
    assert "blk.*.ffn_up.weight" in inspect(path)


def test_gguf_types_are_ggmls() -> None:
    known = {int(kind): (kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: values for number, values in GGUF_TYPES.items() if number in known} == {
        number: values for number, values in known.items() if number in GGUF_TYPES
    }
    # llama.cpp makes Q8_1 and Q8_K of activations; no file holds them.
    assert set(known) - set(GGUF_TYPES) <= {9, 15}


def test_a_split_model_is_one(gguf_file: Callable, tmp_path: Path) -> None:
    path = gguf_file("original", "q8_0").path
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(path.read_bytes())
    header, alone = read_gguf_header(parts[1]), read_gguf_header(path)
    assert (header.files, len(header.tensors)) == (tuple(parts), 2 * len(alone.tensors))
    parts[0].unlink()
    with pytest.raises(InputError, match="00001-of-00002"):
        read_gguf_header(parts[1])


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_damaged_headers_are_refused(onnx_folder: Callable, gguf_file: Callable, tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        whole, read = (onnx_folder("original").path / "model.onnx").read_bytes(), read_onnx_header
    else:
        whole, read = gguf_file("original", "q8_0").path.read_bytes()[:3000], read_gguf_header
    random, path, refused = np.random.default_rng(0), tmp_path / f"damaged.{kind}", 0
    for number in range(150):
        data = bytearray(whole)
        if number % 3:
            for _ in range(4):
                data[int(random.integers(len(data)))] = int(random.integers(256))
        else:
            data = data[: int(random.integers(len(data)))]
        path.write_bytes(data)
        try:
            read(path)
        except InputError:
            refused += 1
    assert refused > 20
