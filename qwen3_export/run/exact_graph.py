"""An ONNX graph edited so that no activation is rounded.

Each MatMulNBits has an attribute `accuracy_level`, a single byte after its name. For exact products a copy of the graph
with all levels zero is made in memory, without the onnx library.
"""

from __future__ import annotations

from pathlib import Path

# AttributeProto of onnx.proto: name (field 1), i (field 3), in the order in which fields are written.
_LEVEL = b"\x0a\x0eaccuracy_level\x18"


def exact_graph(path: Path) -> bytes:
    """The graph's bytes with every accuracy level 0; weights stay in their files."""
    return without_rounding(path.read_bytes())


def without_rounding(graph: bytes) -> bytes:
    """As `exact_graph`, for a graph in memory."""
    for level in range(1, 5):
        graph = graph.replace(_LEVEL + bytes([level]), _LEVEL + b"\0")
    return graph
