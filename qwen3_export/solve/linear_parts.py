"""Quantized linears as plain parts, which one process gives to another.

{module name: {tensor: {field: array, number or None}, scheme, error, tokens, fallback}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.solve.job import SolvedLinear
from qwen3_export.solve.method import SolvedWeight

_FIELDS = [field.name for field in fields(QuantizedTensor) if field.name not in ("name", "shape", "scheme")]


def parts_of(linears: Mapping[str, SolvedLinear]) -> dict[str, Any]:
    """What `linears_from` makes the same linears of."""
    return {
        name: {
            "tensor": {key: getattr(linear.solved.tensor, key) for key in _FIELDS},
            "scheme": linear.solved.tensor.scheme.to_dict(),
            "error": linear.solved.error,
            "tokens": linear.tokens,
            "fallback": linear.fallback,
        }
        for name, linear in linears.items()
    }


def linears_from(parts: Mapping[str, Any]) -> dict[str, SolvedLinear]:
    """The linears that `parts_of` took apart."""
    found = {}
    for name, item in parts.items():
        scheme, codes = QuantScheme.from_dict(item["scheme"]), item["tensor"]["codes"]
        tensor = QuantizedTensor(name, codes.shape, scheme, **item["tensor"])
        found[name] = SolvedLinear(SolvedWeight(tensor, item["error"]), item["tokens"], item["fallback"])
    return found
