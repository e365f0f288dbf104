"""A decoder's ONNX graph cut into parts that run one after another.

The weights of one part are in memory.

    inputs ─ [ embedding, mask, RoPE ] ─ [ layers ] ─ [ layers ] ─ … ─ [ norm ] ─ [ rows of the head ] × n ─▶ logits

Layers are told by the names of nodes, as our exports write them. Small ones share a part; a head larger than a part is
cut by rows of its matrix. A node that depends on weights alone is computed in each part that wants it: a dequantized
table never goes from part to part. Needs the onnx library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import onnx

from qwen3_export.errors import InputError

# Weights of a part, counted as the runtime unpacks them. Beside them it holds the layout that its kernels want.
PART_BYTES = 64 << 20
_LAYER = re.compile(r"(?:layer|present)\.(\d+)\.")
_PAST, _PRESENT = "past_key_values.", "present."
# Rows of a head's piece: a multiple of what kernels work on at once.
_ROWS = 64
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_BITS = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.INT32: 32,
    **dict.fromkeys(_FLOATS, 32),
}


@dataclass(frozen=True)
class Part:
    """Nodes that run together.

    `needs` are values from before, `gives` those for later, `caches` its past inputs and their present outputs. `rows`
    are those of the head where it is cut.
    """

    nodes: Sequence[onnx.NodeProto]
    needs: Sequence[str]
    gives: Sequence[str]
    caches: Mapping[str, str]
    rows: range | None = None


class GraphParts:
    """A graph and its parts, in the order in which they run."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = onnx.load(str(path), load_external_data=False)
        except MemoryError:
            raise
        except Exception as error:  # protobuf's errors share no public base below Exception
            raise InputError(f"{path}: not an ONNX model ({str(error).strip() or type(error).__name__})") from error
        graph = self._model.graph
        self.inputs = {value.name: value for value in graph.input}
        self.logits: str = graph.output[0].name
        self.vocab_size = int(graph.output[0].type.tensor_type.shape.dim[-1].dim_value)
        self.metadata = {item.key: item.value for item in self._model.metadata_props}
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._constant, varying = self._told_apart()
        groups = [nodes for unit in _units(varying) for nodes in self._without_wide_head(unit)]
        self.parts = tuple(self._parts(list(self._packed(groups))))

    def is_small(self, part: Part) -> bool:
        """Whether a part's weights keep to `PART_BYTES`.

        Those of one wide layer may not.
        """
        return part.rows is not None or self._bytes(part.nodes) <= PART_BYTES

    def model(self, part: Part, types: Mapping[str, tuple[int, int]]) -> bytes:
        """A part as a model whose weights stay in their files.

        `types` are element type and rank of what it needs that is no input of the whole.
        """
        graph = onnx.GraphProto(name="part", node=part.nodes)
        names = self._weights_of(part.nodes)
        graph.initializer.extend(self._weights[name] for name in names)
        if part.rows is not None:
            _cut_rows(graph, part.rows, self.vocab_size)
        for name in [*part.needs, *part.caches]:
            graph.input.append(self.inputs.get(name) or _value(name, *types[name]))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in [*part.gives, *part.caches.values()])
        model = onnx.ModelProto(ir_version=self._model.ir_version, graph=graph)
        model.opset_import.extend(self._model.opset_import)
        return model.SerializeToString()

    def _told_apart(self) -> tuple[dict[str, onnx.NodeProto], list[onnx.NodeProto]]:
        """Nodes that depend on weights alone, by what they give; and the others."""
        constant: dict[str, onnx.NodeProto] = {}
        varying = []
        for node in self._model.graph.node:
            if all(name in self._weights or name in constant for name in _reads(node)):
                constant |= dict.fromkeys(node.output, node)
            else:
                varying.append(node)
        return constant, varying

    def _constants_of(self, names: Iterable[str]) -> list[onnx.NodeProto]:
        """The constant nodes behind some values, in an order in which they can run."""
        found: dict[str, onnx.NodeProto] = {}
        for name in names:
            if (node := self._constant.get(name)) is not None:
                found |= {n.output[0]: n for n in [*self._constants_of(_reads(node)), node]}
        return list(found.values())

    def _weights_of(self, nodes: Iterable[onnx.NodeProto]) -> list[str]:
        """Names of the weights that nodes use, by way of constant nodes too."""
        read = dict.fromkeys(name for node in nodes for name in _reads(node))
        read |= dict.fromkeys(name for node in self._constants_of(read) for name in _reads(node))
        return [name for name in read if name in self._weights]

    def _bytes(self, nodes: Iterable[onnx.NodeProto]) -> int:
        tensors = (self._weights[name] for name in self._weights_of(nodes))
        return sum(math.prod(tensor.dims) * _BITS.get(tensor.data_type, 8) // 8 for tensor in tensors)

    def _packed(self, groups: Iterable[list[onnx.NodeProto]]) -> Iterator[list[onnx.NodeProto]]:
        """Neighbours joined while their weights fit into one part."""
        together: list[onnx.NodeProto] = []
        for nodes in groups:
            if together and self._bytes([*together, *nodes]) > PART_BYTES:
                yield together
                together = []
            together = [*together, *nodes]
        yield together

    def _parts(self, groups: Sequence[list[onnx.NodeProto]]) -> Iterator[Part]:
        made = [{name for node in nodes for name in node.output} for nodes in groups]
        read = [dict.fromkeys(name for node in nodes for name in _reads(node)) for nodes in groups]
        for i, nodes in enumerate(groups):
            later = {self.logits}.union(*read[i + 1 :])
            known = made[i] | self._weights.keys() | self._constant.keys()
            caches = {name: name.replace(_PAST, _PRESENT) for name in read[i] if name.startswith(_PAST)}
            needs = [name for name in read[i] if name not in known and name not in caches]
            gives = [name for node in nodes for name in node.output if name in later]
            whole = [*self._constants_of(read[i]), *nodes]
            for rows in self._pieces(nodes):
                yield Part(whole, needs, gives, caches, rows)

    def _pieces(self, nodes: Sequence[onnx.NodeProto]) -> Iterator[range | None]:
        if not self._is_wide_head(nodes):
            yield None
            return
        row = max(1, self._bytes(nodes) // self.vocab_size)
        step = max(_ROWS, PART_BYTES // row // _ROWS * _ROWS)
        for begin in range(0, self.vocab_size, step):
            yield range(begin, min(begin + step, self.vocab_size))

    def _without_wide_head(self, unit: list[onnx.NodeProto]) -> list[list[onnx.NodeProto]]:
        """A unit, parted before a head that is to be cut."""
        heads = [i for i, node in enumerate(unit) if self._is_wide_head(unit[i:])]
        return [nodes for nodes in (unit[: heads[0]], unit[heads[0] :]) if nodes] if heads else [unit]

    def _is_wide_head(self, nodes: Sequence[onnx.NodeProto]) -> bool:
        """Whether nodes are a head to be cut by rows.

        That is one product that gives logits, cast perhaps, with a matrix larger than a part.
        """
        product, *rest = nodes
        if self.logits not in nodes[-1].output or any(node.op_type != "Cast" for node in rest):
            return False
        if not self._has_rows(product) or self._bytes([product]) <= PART_BYTES:
            return False
        tensors = [self._weights[name] for name in self._weights_of([product])]
        outside = onnx.TensorProto.EXTERNAL
        return all(tensor.dims[:1] == [self.vocab_size] and tensor.data_location == outside for tensor in tensors)

    def _has_rows(self, product: onnx.NodeProto) -> bool:
        """Whether a product's matrix is stored as `[out, in]`."""
        if product.op_type == "MatMul":
            turned = self._constant.get(product.input[1])
            return turned is not None and turned.op_type == "Transpose"
        attributes = {item.name: item.i for item in product.attribute}
        return product.op_type == "MatMulNBits" or (product.op_type == "FusedMatMul" and attributes.get("transB") == 1)


def _units(nodes: Iterable[onnx.NodeProto]) -> Iterator[list[onnx.NodeProto]]:
    """Neighbours of the same layer; what comes before the first and after the last."""
    seen = False

    def key(node: onnx.NodeProto) -> str:
        nonlocal seen
        found = _LAYER.match(node.name)
        seen = seen or found is not None
        return found[1] if found else "after" if seen else "before"

    for _, unit in groupby(nodes, key):
        yield list(unit)


def _reads(node: onnx.NodeProto) -> list[str]:
    """What a node reads; bodies of loops read values from outside too."""
    names = dict.fromkeys(name for name in node.input if name)
    for body in (item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        for inner in body.node:
            names |= dict.fromkeys(name for name in _reads(inner) if name not in own)
            own |= set(inner.output)
        names |= dict.fromkeys(value.name for value in body.output if value.name not in own)
    return list(names)


def _value(name: str, element_type: int, rank: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, element_type, [None] * rank)


def _cut_rows(graph: onnx.GraphProto, rows: range, height: int) -> None:
    """Keep some rows of every weight, by their place in the file.

    A row may end in the middle of a byte, as an odd number of 4-bit zero points does; a piece never does.
    """
    for tensor in graph.initializer:
        place = {item.key: item for item in tensor.external_data}
        begin, end = (int(place["length"].value) * row // height for row in (rows.start, rows.stop))
        place["offset"].value = str(int(place["offset"].value) + begin)
        place["length"].value = str(end - begin)
        tensor.dims[0] = len(rows)
    for node in graph.node:
        for item in node.attribute:
            if item.name == "N":
                item.i = len(rows)
