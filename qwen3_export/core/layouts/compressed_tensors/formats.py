"""The names of compressed-tensors' formats."""

from __future__ import annotations

from qwen3_export.core.scheme import QuantScheme

MXFP8 = "mxfp8-quantized"
FP4 = {"e8m0": "mxfp4-pack-quantized", "e4m3": "nvfp4-pack-quantized"}


def format_of(scheme: QuantScheme) -> str:
    """compressed-tensors' name of the format that holds a scheme."""
    if scheme.type == "float" and scheme.num_bits == 8 and scheme.scale_dtype == "e8m0":
        return MXFP8
    if scheme.type == "float":
        return FP4.get(scheme.scale_dtype, "float-quantized" if scheme.activations else "naive-quantized")
    return "int-quantized" if scheme.activations else "pack-quantized"
