"""What an ONNX folder is made for.

A target sets operators, activations, accuracy level and the names of its files.

    cpu        model.onnx, model.onnx.data                     ONNX Runtime and onnxruntime-genai on a CPU
    cuda       the same, fp16                                  … on an NVIDIA GPU
    web        onnx/model_q4f16.onnx, …onnx_data, …_data_1     transformers.js, which finds its files by these names
    standard   model.onnx, model.onnx.data                     ai.onnx operators alone, for any runtime

A target sets all four; `--flavor`, `--precision` and `--accuracy-level` override what it sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.errors import InputError, UnsupportedError

MODEL, DATA = "model.onnx", "model.onnx.data"
FLAVORS, PRECISIONS = ("ort", "standard"), ("fp32", "fp16", "bf16")
# Of the standard operators; 21 is the first with 4-bit types in blocks.
OPSETS = (21, 23, 24)
# Browsers hold a file in one array buffer, which ends at 2 GiB.
_WEB_SHARD = 2_000_000_000
# transformers.js refuses more.
MOST_WEB_SHARDS = 100


@dataclass(frozen=True)
class Target:
    """How a graph is written, and for whom.

    `accuracy_level` of MatMulNBits: 0 takes activations as they are, 4 rounds them to int8 in blocks.

    `provider` is onnxruntime-genai's name of the device; `shard_bytes` the size from which data goes to a next file.
    """

    name: str
    flavor: str
    precision: str
    accuracy_level: int
    provider: str | None = None
    shard_bytes: int | None = None
    opset: int | None = None

    @property
    def kernels(self) -> str:
        """Whose kernels run the graph: cpu, cuda or webgpu."""
        return "webgpu" if self.is_web else self.provider or "cpu"

    @property
    def is_web(self) -> bool:
        """Whether files are named and described as transformers.js wants them."""
        return self.name == "web"


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "ort", "fp32", 4),
        Target("cuda", "ort", "fp16", 0, provider="cuda"),
        Target("web", "ort", "fp16", 4, shard_bytes=_WEB_SHARD),
        Target("standard", "standard", "fp32", 0),
    )
}


@dataclass(frozen=True)
class Files:
    """Names inside the folder; data beyond `shard_bytes` goes to a next file."""

    model: str = MODEL
    data: str = DATA
    shard_bytes: int | None = None

    def shard(self, number: int) -> str:
        """The name of a data file, beside the model.

        The first one has no number.
        """
        return f"{self.data}_{number}" if number else self.data


def choose(
    name: str,
    flavor: str | None = None,
    precision: str | None = None,
    accuracy_level: int | None = None,
    shard_bytes: int | None = None,
    opset: int | None = None,
) -> Target:
    """A target by name with what overrides it; InputError names what is no choice."""
    given = (("--target", name, TARGETS), ("--flavor", flavor, FLAVORS), ("--precision", precision, PRECISIONS))
    for option, value, choices in given:
        if value is not None and value not in choices:
            raise InputError(f"{option} {value}: one of {', '.join(choices)} was expected")
    target = TARGETS[name]
    if accuracy_level not in (None, 0, 4):
        raise InputError(
            f"--accuracy-level {accuracy_level}: 0 (activations as they are) or 4 (rounded to int8) was expected"
        )
    if target.is_web and flavor == "standard":
        raise InputError("--target web is written in ONNX Runtime's operators", "leave --flavor standard away")
    is_standard = (flavor or target.flavor) == "standard"
    if opset is not None and (opset not in OPSETS or not is_standard):
        raise InputError(
            f"--opset {opset}: one of {', '.join(map(str, OPSETS))} was expected, with --target or --flavor standard",
            "leave --opset away" + ("" if is_standard else ": ONNX Runtime's own operators need no other"),
        )
    if flavor == "standard" and accuracy_level is None:
        accuracy_level = TARGETS["standard"].accuracy_level
    return replace(
        target,
        flavor=flavor or target.flavor,
        precision=precision or target.precision,
        accuracy_level=target.accuracy_level if accuracy_level is None else accuracy_level,
        shard_bytes=shard_bytes or target.shard_bytes,
        opset=opset,
    )


def web_dtype(checkpoint: Checkpoint, precision: str) -> str:
    """transformers.js's name of what the folder holds; UnsupportedError when it has none."""
    bits = {scheme.num_bits for scheme in checkpoint.schemes.values()}
    half = {"fp16": "f16", "fp32": ""}.get(precision)
    if half is None:
        raise UnsupportedError(f"--precision {precision}: transformers.js has fp16 and fp32", "leave --precision away")
    if not bits:
        return precision
    if min(bits) in (2, 4):
        return f"q{min(bits)}{half}"
    return "int8"


def files_of(target: Target, checkpoint: Checkpoint) -> Files:
    """The names of model and data."""
    if not target.is_web:
        return Files(shard_bytes=target.shard_bytes)
    dtype = web_dtype(checkpoint, target.precision)
    suffix = "" if dtype == "fp32" else f"_{dtype}"
    return Files(f"onnx/model{suffix}.onnx", f"onnx/model{suffix}.onnx_data", target.shard_bytes)
