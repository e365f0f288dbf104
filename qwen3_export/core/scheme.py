"""Quantization schemes: how a matrix is stored, and its inputs rounded.

scheme                                                  known as
{num_bits: 4}                                           W4A16, one scale per 128 inputs
{num_bits: 8, strategy: channel, activations: …}        INT8 W8A8
{num_bits: 8, type: float, strategy: channel, …}        FP8 E4M3
{num_bits: 8, type: float, strategy: block, …}          FP8 with a scale per 128 × 128 weights
{num_bits: 8, type: float, group_size: 32, scale_dtype: e8m0}   MXFP8
{num_bits: 4, type: float, group_size: 32, scale_dtype: e8m0}   MXFP4
{num_bits: 4, type: float, group_size: 16, scale_dtype: e4m3}   NVFP4
{type: kquant, ggml_type: q4_k}                         a block type of ggml; everything else follows from its name
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_export.core.kquant import BLOCK_TYPES, BlockType
from qwen3_export.errors import RecipeError

SCALE_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "e8m0": 8, "e4m3": 8}
STRATEGIES = ("tensor", "channel", "group", "block")
ACTIVATIONS = ("dynamic-token", "dynamic-group", "static-tensor")
# Inputs that share one scale under `dynamic-group`: 128 as in the official FP8 releases, 16 beside NVFP4 weights.
ACTIVATION_GROUP, NVFP4_GROUP = 128, 16
_BITS = {"int": (2, 3, 4, 8), "float": (4, 8), "kquant": (2, 3, 4, 5, 6)}
_WIDE_SCALES = ("bf16", "fp16", "fp32")
_SCALES = {("float", 4): ("e8m0", "e4m3"), ("float", 8): (*_WIDE_SCALES, "e8m0")}


@dataclass(frozen=True)
class QuantScheme:
    """How the numbers of one weight matrix `[out, in]` are stored.

    `strategy` says which weights share one scale: the whole `tensor`, an output `channel`, a `group` of `group_size`
    consecutive inputs of one output channel, or a `block` of `block_shape`. Integer codes are unsigned in memory; a
    symmetric scheme has the implicit zero point `2 ** (num_bits - 1)`, and a float one is E4M3 (8 bits) or E2M1 (4
    bits). `signed_scales` lets scales be negative, which ONNX Runtime, llama.cpp and vLLM accept and TensorRT does not.
    `activations` says how a runtime rounds the linear's inputs, to the weights' own type (INT8, E4M3 or NVFP4), if at
    all. `type` kquant stands for a block type of ggml: its name, `ggml_type`, decides every field but `activations`;
    see `core.kquant`.
    """

    num_bits: int = 4
    type: str = "int"
    symmetric: bool = True
    strategy: str = "group"
    group_size: int | None = 128
    block_shape: tuple[int, int] | None = None
    scale_dtype: str = "bf16"
    signed_scales: bool = False
    activations: str | None = None
    ggml_type: str | None = None

    def __post_init__(self) -> None:
        self._check_choice("type", self.type, ("int", "float", "kquant"))
        self._settle_kquant()
        self._check_choice("strategy", self.strategy, STRATEGIES)
        self._check_choice("scale_dtype", self.scale_dtype, tuple(SCALE_BITS))
        self._check_choice("num_bits", self.num_bits, _BITS[self.type])
        for key in ("symmetric", "signed_scales"):
            self._check_choice(key, getattr(self, key), (True, False))
        if self.activations is not None:
            self._check_choice("activations", self.activations, ACTIVATIONS)
        self._check_grain()
        self._check_float()
        if self.signed_scales and not self.symmetric:
            raise RecipeError("scheme has signed_scales: true, which only a symmetric scheme can use")
        nvfp4 = (self.scale_dtype, self.activations) == ("e4m3", "dynamic-group")
        if self.activations and self.num_bits != 8 and not nvfp4:
            raise RecipeError(
                f"scheme rounds activations ({self.activations}) beside {self.num_bits}-bit weights",
                "activations are rounded to 8 bits beside 8-bit weights, and to NVFP4 (dynamic-group) beside NVFP4",
            )

    def _settle_kquant(self) -> None:
        """Fill in the numbers that follow from a block type's name."""
        if self.type != "kquant":
            if self.ggml_type is not None:
                raise RecipeError(f"scheme has ggml_type: {self.ggml_type!r}, which only type: kquant has")
            return
        self._check_choice("ggml_type", self.ggml_type or "", tuple(BLOCK_TYPES))
        if self.activations:
            raise RecipeError(f"scheme rounds activations ({self.activations}) beside {self.ggml_type} weights")
        for key, value in _derived(BLOCK_TYPES[str(self.ggml_type)]).items():
            object.__setattr__(self, key, value)

    def _check_grain(self) -> None:
        if self.strategy == "group":
            if type(self.group_size) is not int or self.group_size < 1:
                raise RecipeError(
                    f"group_size is {self.group_size!r}: a positive whole number was expected",
                    "use 32, 64 or 128, or strategy: channel for one scale per output row",
                )
        elif self.group_size is not None:
            object.__setattr__(self, "group_size", None)
        if self.strategy != "block":
            object.__setattr__(self, "block_shape", None)
            return
        shape = self.block_shape or (128, 128)
        if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
            raise RecipeError(f"block_shape is {self.block_shape!r}: two positive whole numbers were expected")
        object.__setattr__(self, "block_shape", tuple(shape))
        if not self.symmetric:
            raise RecipeError("scheme has strategy: block and zero points; a block is always symmetric")

    def _check_float(self) -> None:
        if self.type == "float" and (not self.symmetric or self.signed_scales):
            raise RecipeError("scheme has type: float, which has its own sign: it is symmetric, its scales positive")
        allowed = _SCALES.get((self.type, self.num_bits), _WIDE_SCALES)
        if self.scale_dtype not in allowed:
            raise RecipeError(
                f"scheme has {self.num_bits}-bit {self.type} weights with {self.scale_dtype} scales",
                "4-bit floats have e8m0 scales (MXFP4) or e4m3 scales (NVFP4), 8-bit floats may have e8m0 scales "
                "(MXFP8), everything else bf16, fp16 or fp32",
            )
        size = {"e8m0": 32, "e4m3": 16}.get(self.scale_dtype)
        if size is not None and (self.strategy, self.group_size) != ("group", size):
            raise RecipeError(
                f"scheme has {self.scale_dtype} scales, whose group_size is {size}, "
                f"not {self.group_size or self.strategy}"
            )

    @staticmethod
    def _check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
        if type(value) is not type(choices[0]) or value not in choices:
            raise RecipeError(f"scheme has {key}: {value!r}; one of {list(choices)} was expected")

    @property
    def label(self) -> str:
        """A short name, e.g. `w4-g128-sym` or `fp8-channel-dynamic-token`, used in tables and manifests."""
        if self.ggml_type is not None:
            return self.ggml_type
        grains = {"group": f"g{self.group_size}", "block": "x".join(map(str, self.block_shape or ()))}
        kind = {"e8m0": f"mxfp{self.num_bits}", "e4m3": "nvfp4"}.get(self.scale_dtype, f"fp{self.num_bits}")
        parts = [f"w{self.num_bits}" if self.type == "int" else kind, grains.get(self.strategy, self.strategy)]
        if self.type == "int":
            parts.append("signed" if self.signed_scales else "sym" if self.symmetric else "asym")
        return "-".join([*parts, self.activations] if self.activations else parts)

    @property
    def midpoint(self) -> int:
        """The implicit zero point of a symmetric integer scheme."""
        return 1 << (self.num_bits - 1)

    @property
    def max_code(self) -> int:
        """The largest unsigned code."""
        return (1 << self.num_bits) - 1

    @property
    def block_type(self) -> BlockType | None:
        """The ggml block type of a kquant scheme."""
        return BLOCK_TYPES[self.ggml_type] if self.ggml_type is not None else None

    @property
    def activation_group(self) -> int:
        """Number of inputs that share one scale under `dynamic-group`."""
        return NVFP4_GROUP if self.num_bits == 4 else ACTIVATION_GROUP

    @property
    def has_input_scale(self) -> bool:
        """Whether rounding inputs takes a number from calibration."""
        return self.activations == "static-tensor" or (self.activations is not None and self.num_bits == 4)

    @property
    def per_row(self) -> bool:
        """Whether every output row has scales of its own, as weight-only kernels require."""
        return self.strategy in ("channel", "group")

    def group_length(self, in_features: int) -> int:
        """Number of consecutive inputs that share one scale."""
        if self.strategy == "block" and self.block_shape:
            return self.block_shape[1]
        return self.group_size if self.group_size is not None else in_features

    def num_groups(self, in_features: int) -> int:
        """Number of scales side by side along the inputs."""
        return math.ceil(in_features / self.group_length(in_features))

    def rows_per_scale(self, out_features: int) -> int:
        """Number of output rows that share one scale."""
        if self.strategy == "block" and self.block_shape:
            return self.block_shape[0]
        return out_features if self.strategy == "tensor" else 1

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a weight `[out, in]`."""
        return math.ceil(shape[0] / self.rows_per_scale(shape[0])), self.num_groups(shape[1])

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise RecipeError when a weight `[out, in]` cannot be cut into this scheme's groups."""
        if len(shape) != 2:
            raise RecipeError(f"{name}: only matrices can be quantized, its shape is {list(shape)}")
        if (block := self.block_type) and shape[1] % block.block:
            raise RecipeError(
                f"{name}: its {shape[1]} inputs are not divisible by {block.block}, the block of {block.name}",
                "use a type with blocks of 32 (q4_0, q5_0, q8_0, iq4_nl), or a rule that leaves this tensor in 16 bits",
            )
        if self.strategy != "block" and shape[1] % self.group_length(shape[1]):
            raise RecipeError(
                f"{name}: its {shape[1]} inputs are not divisible by group_size {self.group_size}",
                f"use a group_size that divides {shape[1]}, or a rule that leaves this tensor in 16 bits",
            )
        if self.activations == "dynamic-group" and shape[1] % self.activation_group:
            raise RecipeError(
                f"{name}: its {shape[1]} inputs are not divisible by {self.activation_group}, which share a scale",
                "use activations: dynamic-token, or a rule that leaves this tensor in 16 bits",
            )

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Storage per weight in bits, scales and zero points included."""
        if block := self.block_type:
            return 8 * block.bytes_per_block / block.block
        each = SCALE_BITS[self.scale_dtype] + (0 if self.symmetric else self.num_bits)
        return self.num_bits + each * math.prod(self.grid(shape)) / math.prod(shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        values = dataclasses.asdict(self)
        if self.ggml_type is None:
            del values["ggml_type"]
        return {**values, "block_shape": list(self.block_shape) if self.block_shape else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "scheme") -> QuantScheme:
        """Build from plain values; RecipeError names an unknown key and its nearest neighbour."""
        check_keys(values, [f.name for f in dataclasses.fields(cls)], where)
        block = values.get("block_shape")
        if block is not None and not isinstance(block, list | tuple):
            raise RecipeError(f"{where}: block_shape is {block!r}: two positive whole numbers were expected")
        if block is not None:
            values = {**values, "block_shape": tuple(block)}
        if values.get("strategy", "group") != "group":
            values = {**values, "group_size": None}
        found = cls(**values)
        if found.ggml_type is not None:
            _check_derived(found, values, where)
        return found


def _derived(block: BlockType) -> dict[str, Any]:
    """The numbers of a kquant scheme that follow from its block type."""
    return {
        "num_bits": block.num_bits,
        "symmetric": not block.has_mins,
        "strategy": "group",
        "group_size": block.group,
        "block_shape": None,
        "scale_dtype": "fp16",
        "signed_scales": False,
    }


def _check_derived(scheme: QuantScheme, values: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for a given number that contradicts the block type's."""
    for key, value in values.items():
        if value != getattr(scheme, key):
            raise RecipeError(
                f"{where}: {key} is {value!r} beside ggml_type {scheme.ggml_type}, whose is {getattr(scheme, key)!r}",
                f"leave {key} away: it follows from the type",
            )


_PLAIN_TYPES = {
    "q2_0": QuantScheme(2, group_size=64, scale_dtype="fp16", signed_scales=True),
    "q4_0": QuantScheme(4, group_size=32, scale_dtype="fp16", signed_scales=True),
    "q8_0": QuantScheme(8, group_size=32, scale_dtype="fp16"),
    "mxfp4": QuantScheme(4, "float", group_size=32, scale_dtype="e8m0"),
}
GGML_TYPES = (*_PLAIN_TYPES, *BLOCK_TYPES)


def scheme_of_type(name: str) -> QuantScheme:
    """The scheme of a ggml type such as `q4_k`; RecipeError if unknown."""
    if name in _PLAIN_TYPES:
        return _PLAIN_TYPES[name]
    if name not in BLOCK_TYPES:
        near = difflib.get_close_matches(name, GGML_TYPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise RecipeError(f"{name!r} is no ggml type; one of {', '.join(GGML_TYPES)} was expected", hint)
    return QuantScheme(type="kquant", ggml_type=name)


def check_keys(values: Iterable[Any], known: list[str], where: str, error: type[RecipeError] = RecipeError) -> None:
    """Raise RecipeError for the first unknown key.

    The hint is the nearest known one.
    """
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise error(f"{where}: unknown key {key!r}", hint)
