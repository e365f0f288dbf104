"""An ONNX graph whose activations are rounded by nothing.

It is edited without the onnx library.

An accuracy level is an attribute of each MatMulNBits, one byte behind its name: whoever wants exact products
loads a copy of the graph, in memory, in which they are zero.
"""

from __future__ import annotations

from pathlib import Path

# AttributeProto of onnx.proto: name (field 1), i (field 3), in the order in which fields are written.
_LEVEL = b"\x0a\x0eaccuracy_level\x18"


def exact_graph(path: Path) -> bytes:
    """The graph with every accuracy level 0; its weights stay where they are."""
    graph = path.read_bytes()
    for level in range(1, 5):
        graph = graph.replace(_LEVEL + bytes([level]), _LEVEL + b"\0")
    return graph
