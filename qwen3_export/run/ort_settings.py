"""What ONNX Runtime is told when a session is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3_export.core.onnx_header import read_onnx_header
from qwen3_export.core.processors import others_wait, sums_int8_exactly
from qwen3_export.errors import InputError

# Keeps products of uint8 and int8 from saturating: ONNX Runtime makes int8 matrices uint8. The second entry has it
# leave DequantizeLinear's alone. Of those 1.31 makes what it then refuses: zero points of another shape than the
# scales, and a matrix with two readers twice.
EXACT_SUMS = {"session.x64quantprecision": "1", "session.qdqisint8allowed": "1"}
# Level of its log: what is fatal. Errors become exceptions.
_FATAL = 4


def session_settings(
    onnxruntime: Any, graph: Path, threads: int, exact: bool = False, data: bool = False, **entries: str
) -> Any:
    """SessionOptions for a graph.

    `exact`: the products that ONNX Runtime makes of DequantizeLinear and MatMul round no activation. `data`: the graph
    comes from memory, its data from beside the file. `entries` are more of its entries `session.NAME`.
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, _FATAL
    found = {**exact_sums(graph), **{f"session.{name}": value for name, value in entries.items()}}
    # Threads that wait for each other spin, also between two runs. Where other work has a processor, that takes it
    # from what is waited for: prompts then take twice as long.
    if threads > 1 and others_wait():
        found["session.intra_op.allow_spinning"] = "0"
    if exact:
        found["session.qdq_matmulnbits_accuracy_level"] = "0"
    if data:
        found["session.model_external_initializers_file_folder_path"] = str(graph.parent)
    for name, value in found.items():
        settings.add_session_config_entry(name, value)
    return settings


def exact_sums(graph: Path) -> dict[str, str]:
    """What a session must be told so that it adds products of int8 exactly.

    They saturate on x86 without VNNI, unless the session forbids it; with VNNI that would cost half the speed.
    """
    try:
        operators = read_onnx_header(graph).operators
    except InputError:
        # Whatever is wrong with the file, ONNX Runtime says it better.
        return {}
    # Not beside Q/DQ pairs: of those ONNX Runtime would make products of int8 and uint8, for which it has no kernel.
    pairs = {"QuantizeLinear", "DequantizeLinear"} <= operators.keys()
    return {} if "MatMulInteger" not in operators or pairs or sums_int8_exactly() else EXACT_SUMS
