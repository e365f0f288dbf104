"""Our own layout for folders that hold block types of ggml.

No other layout can hold them. An export to GGUF moves the bits without changing a number.

    NAME.weight_codes         uint8 [out, in * bits / 8]    lowest bits first
    NAME.weight_scales        int8 or fp16 [out, groups]
    NAME.weight_mins          uint8 or fp16 [out, groups]   where the type has minimums
    NAME.weight_super_scales  fp16 [out, in / 256]          super-blocks only
    NAME.weight_super_mins    fp16 [out, in / 256]

The fields are those of `core.tensor`. Integer and float schemes in the same folder (q4_0, q8_0, mxfp4) are stored as
compressed-tensors stores them. Other loaders do not know this layout, and must stop: the quantization_config has no
`quant_method`, which makes transformers refuse the folder. With an unknown method it would only warn, and go on with
random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.layouts import NEEDS_ORIGINAL, Schemes, Shapes, Stored, compressed_tensors
from qwen3_export.core.pack import pack_int32, unpack_int32
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, block_specs
from qwen3_export.core.tensorfile import Spec
from qwen3_export.errors import CheckpointError

METHOD = "qwen3-export-ggml"


def supports(scheme: QuantScheme) -> str | None:
    """None for block types and weight-only schemes, else why the scheme does not fit."""
    if scheme.ggml_type is not None:
        return None
    if scheme.activations:
        return "a ggml type says nothing of how inputs are rounded"
    return compressed_tensors.supports(scheme)


def specs(module: str, shape: tuple[int, int], scheme: QuantScheme, stored: Stored | None = None) -> dict[str, Spec]:
    """See the package docstring."""
    if scheme.ggml_type is None:
        return compressed_tensors.specs(module, shape, scheme, stored)
    codes = {f"{module}.weight_codes": (np.dtype(np.uint8), (shape[0], shape[1] * scheme.num_bits // 8))}
    return {**codes, **{f"{module}.weight_{key}": spec for key, spec in block_specs(scheme, shape).items()}}


def pack(tensor: QuantizedTensor) -> dict[str, NDArray]:
    """See the package docstring."""
    name, scheme = tensor.name, tensor.scheme
    if scheme.ggml_type is None:
        return compressed_tensors.pack(tensor)
    codes = pack_int32(tensor.codes, scheme.num_bits).view(np.uint8)
    fields = {f"{name}.weight_{key}": getattr(tensor, key) for key in block_specs(scheme, tensor.shape)}
    return {f"{name}.weight_codes": codes, **fields}


def unpack(stored: Stored, module: str, shape: tuple[int, int], scheme: QuantScheme) -> QuantizedTensor:
    """See the package docstring."""
    if scheme.ggml_type is None:
        return compressed_tensors.unpack(stored, module, shape, scheme)
    words = np.ascontiguousarray(stored.read(f"{module}.weight_codes")).view("<i4")
    codes = unpack_int32(words, scheme.num_bits, shape[1])
    fields: dict[str, Any] = {key: stored.read(f"{module}.weight_{key}") for key in block_specs(scheme, shape)}
    return QuantizedTensor(module, shape, scheme, codes, **fields)


def config(schemes: Mapping[str, QuantScheme], linears: list[str]) -> dict[str, Any]:
    """A description of the folder without `quant_method`; see the module docstring."""
    return {
        "format": METHOD,
        "description": "block types of ggml; `qwen3-export gguf` makes the file for llama.cpp from this folder",
        "tensor_types": {name: scheme.label for name, scheme in schemes.items()},
        "ignore": [name for name in linears if name not in schemes],
    }


def read_schemes(where: str, stored: Stored, linears: Shapes) -> Schemes:
    """Only our own manifest says what is in such a folder."""
    raise CheckpointError(f"{where}: a {METHOD} folder without its qwen3-export.json", NEEDS_ORIGINAL)
