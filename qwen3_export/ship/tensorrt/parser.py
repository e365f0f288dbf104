"""What TensorRT's parser reads of each operator.

It drops what it does not know without a word: of `Attention` the seventh input and `qk_matmul_output_mode`, of `Cast`
`saturate`, and every made-up attribute (found by changing them and looking at the parsed network, 1.7). So a graph may
have what is listed here, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.onnx.library import ir
from qwen3_export.ship.onnx.target import MODEL

# Operator → its attributes: None where any value is read, else the one value that is.
_READ: dict[str, dict[str, int | None]] = {
    "Attention": {"scale": None, "is_causal": 0},
    "Cast": {"to": None},
    "Concat": {"axis": None},
    "DequantizeLinear": {"axis": None, "block_size": None},
    "Gather": {"axis": None},
    "RMSNormalization": {"axis": -1, "epsilon": None, "stash_type": None},
    "ReduceMax": {"keepdims": None},
    "ReduceSum": {"keepdims": None},
    "RotaryEmbedding": {"interleaved": None},
    "Shape": {"start": None, "end": None},
    "Softmax": {"axis": None},
    "TRT_FP4DynamicQuantize": {"axis": None, "block_size": None, "scale_type": None},
    "TopK": {"axis": None},
    "Transpose": {"perm": None},
}
# Inputs that are read, of operators that may have more.
_INPUTS = {"Attention": 4, "RotaryEmbedding": 3}


def check_graph(folder: Path) -> None:
    """Raise UnsupportedError for the first attribute or input that the parser would drop."""
    for node in ir.load(folder / MODEL).graph:
        read = _READ.get(node.op_type, {})
        for name, attribute in node.attributes.items():
            if name not in read or read[name] not in (None, attribute.value):
                raise UnsupportedError(f"{node.name}: TensorRT's parser drops {node.op_type}'s {name}")
        if len(node.inputs) > _INPUTS.get(node.op_type, len(node.inputs)):
            raise UnsupportedError(
                f"{node.name}: TensorRT's parser reads {_INPUTS[node.op_type]} inputs of {node.op_type}, "
                f"it has {len(node.inputs)}"
            )
