"""Building an ONNX graph while its weights stream into a data file.

onnx-ir holds the graph.

A weight is written when it is mentioned and forgotten at once: the graph keeps its place in
`model.onnx.data`, so memory is bounded by the largest tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.contiguous import contiguous
from qwen3_export.core.growing_hash import GrowingHash
from qwen3_export.core.tensorfile import StoredTensor
from qwen3_export.ship.onnx.library import ir
from qwen3_export.ship.onnx.target import Files

# ONNX Runtime's own operators, and TensorRT's.
CONTRIB, TENSORRT = "com.microsoft", "trt"
# Weights start on page boundaries, so that a runtime can map each of them on its own.
ALIGNMENT = 4096
# Bytes after which the hash is told to go on, also in the midst of a large matrix.
_ANNOUNCED = 16 << 20
_IR_VERSION = 10
_DEFAULT_FILES = Files()


class GraphBuilder:
    """Collects inputs, nodes and outputs.

    `save` writes the model beside its data files; `hashes` are theirs by name, computed while they grow.
    """

    def __init__(self, folder: Path, opset: int, files: Files = _DEFAULT_FILES) -> None:
        self.folder, self._opset, self._files = folder, opset, files
        self._place = (folder / files.model).parent
        self._place.mkdir(exist_ok=True)
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.hashes: dict[str, GrowingHash] = {}
        self._data = self._next_shard()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; axes given by name are dynamic."""
        value = _typed(name, dtype, shape)
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a node's result as a graph output."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def weight(
        self, name: str, array: NDArray, dtype: ir.DataType | None = None, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """Stream a weight into the data file.

        A second mention of the same name shares the first.

        `dtype` and `shape` describe packed sub-byte types, whose `array` is raw bytes.
        """
        kind = dtype or ir.DataType.from_numpy(array.dtype)
        return self.weight_parts(name, [array], kind, shape or array.shape)

    def weight_parts(self, name: str, parts: Iterable[NDArray], dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """As `weight`, for one whose elements come piece by piece.

        One piece is in memory at a time.
        """
        if name in self._initializers:
            return self._initializers[name]
        self._make_room(dtype.bitwidth * math.prod(shape) // 8)
        offset = self._data.tell()
        for part in parts:
            whole = contiguous(part).reshape(-1).view(np.uint8).data
            for begin in range(0, len(whole), _ANNOUNCED):
                self._data.write(whole[begin : begin + _ANNOUNCED])
                self._announce()
        length = self._data.tell() - offset
        place = ir.Shape(shape)
        data = Path(self._data.name).name
        tensor = ir.ExternalTensor(data, offset, length, dtype, shape=place, name=name, base_dir=self._place)
        return self._register(name, tensor)

    def _next_shard(self) -> BinaryIO:
        name = self._files.shard(len(self.hashes))
        file = (self.folder / name).open("wb")
        self.hashes[name] = GrowingHash(self.folder / name)
        return file

    def _announce(self) -> None:
        """Let the written data be hashed."""
        self._data.flush()
        next(reversed(self.hashes.values())).wrote(self._data.tell())

    def _close_shard(self) -> None:
        if not self._data.closed:
            self._announce()
            self._data.close()
            next(reversed(self.hashes.values())).finish()

    def _make_room(self, length: int) -> None:
        """Go to the next page of the data file.

        Or to the next file, when this one would become too large.
        """
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        limit = self._files.shard_bytes
        if limit is not None and self._data.tell() and self._data.tell() + length > limit:
            self._close_shard()
            self._data = self._next_shard()

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant inside `model.onnx`; equal constants are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._register(name, ir.tensor(array, name=name))
        return self._constants[key]

    def _register(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._initializers[name] = value
        return value

    def op(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node and return its first output.

        None stands for an absent optional input.
        """
        return self.ops(kind, inputs, name, [name], domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """As `op`, with all outputs; an empty output name leaves that optional output out."""
        values = [ir.Value(name=f"{out}_out" if out else "") for out in outputs]
        self._nodes.append(ir.node(kind, inputs, attributes=attributes, domain=domain, outputs=values, name=name))
        return values

    @contextmanager
    def body(self, name: str, inputs: Sequence[tuple[str, ir.DataType, Sequence[int | str]]]) -> Iterator[Body]:
        """Nodes appended inside belong to the body of a loop.

        Weights and constants stay in the outer graph.
        """
        body = Body(name, [_typed(f"{name}.{label}", dtype, shape) for label, dtype, shape in inputs])
        outer, self._nodes = self._nodes, body.nodes
        try:
            yield body
        finally:
            self._nodes = outer

    def float_weight(self, name: str, weight: NDArray | StoredTensor, dtype: ir.DataType) -> ir.Value:
        """Store a 16- or 32-bit weight for use as `dtype`.

        `as_type` then gives it that type.

        Under fp32 activations a 16-bit weight is stored as it came: half the size, and exact.
        """
        kind = ir.DataType.from_numpy(weight.dtype)
        keep = kind == dtype or (dtype == ir.DataType.FLOAT and weight.dtype.itemsize == 2)
        if keep and isinstance(weight, StoredTensor):
            return self.weight_parts(name, weight.pieces(), kind, weight.shape)
        array = weight.whole() if isinstance(weight, StoredTensor) else weight
        return self.weight(name, array if keep else array.astype(dtype.numpy()))

    def as_type(self, value: ir.Value, have: ir.DataType | None, want: ir.DataType, name: str) -> ir.Value:
        """A Cast node, or the value itself when it has the wanted type already."""
        return value if have == want else self.op("Cast", [value], name, to=want)

    def save(self, metadata: dict[str, str]) -> None:
        """Write the model; its weights are on the disk already."""
        self._close_shard()
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self._opset} | {node.domain: 1 for node in self._nodes if node.domain},
            name="qwen3",
        )
        model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="qwen3-export")
        model.metadata_props.update(metadata)
        ir.save(model, self.folder / self._files.model)

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close_shard()


class Body:
    """The graph inside a Loop, in the making.

    It has inputs, nodes, and results in order.
    """

    def __init__(self, name: str, inputs: list[ir.Value]) -> None:
        self.name, self.inputs = name, inputs
        self.nodes: list[ir.Node] = []
        self._results: list[ir.Value] = []

    def result(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a node's value as the next result."""
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._results.append(value)

    @property
    def graph(self) -> ir.Graph:
        """The finished body."""
        return ir.Graph(self.inputs, self._results, nodes=self.nodes, name=self.name)


def _typed(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
