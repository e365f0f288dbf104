"""An ONNX graph run so that no activation is rounded.

Each MatMulNBits and QMoE has an attribute `accuracy_level`, a single byte after its name. For exact products a copy of
the graph with all levels zero is made in memory, without the onnx library. QMoE's kernels of 8 bits round at every
level. ONNX Runtime makes exact ones where an environment variable says so while a session is made
(`onnxruntime/contrib_ops/cpu/moe/moe_quantization_cpu.cc`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# AttributeProto of onnx.proto: name (field 1), i (field 3), in the order in which fields are written.
_LEVEL = b"\x0a\x0eaccuracy_level\x18"


_EXPERTS, _VARIABLE, _MAKING = b"\x22\x04QMoE", "ORT_QMOE_CPU_QNBIT_GEMM", threading.Lock()


def exact_graph(path: Path) -> bytes:
    """The graph's bytes with every accuracy level 0; weights stay in their files."""
    return without_rounding(path.read_bytes())


def without_rounding(graph: bytes) -> bytes:
    """As `exact_graph`, for a graph in memory."""
    for level in range(1, 5):
        graph = graph.replace(_LEVEL + bytes([level]), _LEVEL + b"\0")
    return graph


@contextmanager
def kernels(graph: bytes | str, exact: bool) -> Iterator[None]:
    """A session that is made inside gets QMoE's usual or exact kernels.

    The environment is the process's own, so sessions of graphs with experts are made one at a time.
    """
    if isinstance(graph, str) or _EXPERTS not in graph:
        # A graph that is named by its path is not edited, so not exact.
        yield
        return
    with _MAKING:
        before = os.environ.get(_VARIABLE)
        if exact:
            os.environ[_VARIABLE] = "fp32"
        try:
            yield
        finally:
            if exact:
                os.environ.pop(_VARIABLE)
            if before is not None:
                os.environ[_VARIABLE] = before
