"""onnx-ir, without the computer algebra that takes most of its import's time.

It uses sympy for arithmetic with symbolic dimensions, which no export does.
"""

from qwen3_export.core.deferred import deferred

with deferred("sympy"):
    import onnx_ir as ir

__all__ = ["ir"]
