"""Optimization profiles: the shapes that a plan accepts, for builder and `trtexec`.

    profile   input_ids, position_ids   attention_mask           past_key_values.N
    prefill   1 … prompt                1 … prompt + context     0 … context
    decode    1                         1 … 1 + context          0 … context

Each range is given as (smallest, likely, largest). The batch is one sequence. The mask covers past and new tokens.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.errors import InputError
from qwen3_export.ship.onnx.sidecars import context_length

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Profile:
    """Most tokens of one prefill, and of the key/value cache before it."""

    max_prompt: int
    max_context: int


def default_profile(config: Qwen3Config, max_prompt: int | None = None, max_context: int | None = None) -> Profile:
    """The given profile; by default 1024 prompt tokens and 4096 cached ones.

    Defaults are cut to the model's positions, and the prompt's to the given cache. Raises InputError for a prompt that
    does not fit into the cache, after which no token could be decoded.
    """
    most = context_length(config)
    context = max_context or max(min(4096, most), max_prompt or 0)
    prompt = max_prompt or min(1024, most, context)
    if prompt > context:
        raise InputError(
            f"--max-prompt {prompt}: a prompt of that length does not fit into the cache of --max-context {context}",
            f"give --max-context {prompt} or more",
        )
    return Profile(prompt, context)


def check_positions(config: Qwen3Config, profile: Profile) -> None:
    """Raise InputError for a profile of more positions than the model has."""
    most = context_length(config)
    for option, asked in (("--max-prompt", profile.max_prompt), ("--max-context", profile.max_context)):
        if asked > most:
            raise InputError(f"{option} {asked}: the model has {most} positions", f"give {option} {most}, or less")


def prefill_shapes(config: Qwen3Config, profile: Profile) -> Shapes:
    """Shapes of prefill, in one piece or several; decoding fits in too."""
    prompt, context = profile.max_prompt, profile.max_context
    likely = max(1, prompt // 2)
    return _shapes(config, (1, likely, prompt), (0, 0, context), (1, likely, prompt + context))


def decode_shapes(config: Qwen3Config, profile: Profile) -> Shapes:
    """Shapes of decoding: one new token at a time."""
    context = profile.max_context
    return _shapes(config, (1, 1, 1), (0, context // 2, context), (1, context // 2 + 1, context + 1))


def _shapes(
    config: Qwen3Config, new: tuple[int, int, int], past: tuple[int, int, int], total: tuple[int, int, int]
) -> Shapes:
    heads, head_dim = config.num_kv_heads, config.head_dim

    def row(lengths: tuple[int, int, int]) -> tuple[Shape, Shape, Shape]:
        a, b, c = lengths
        return (1, a), (1, b), (1, c)

    found: Shapes = {"input_ids": row(new), "attention_mask": row(total), "position_ids": row(new)}
    a, b, c = past
    caches = (1, heads, a, head_dim), (1, heads, b, head_dim), (1, heads, c, head_dim)
    for layer in range(config.num_layers):
        found[f"past_key_values.{layer}.key"] = found[f"past_key_values.{layer}.value"] = caches
    return found


def trtexec_line(
    onnx: Path, plan: Path, profiles: Sequence[Shapes], engine: str = "trt", capabilities: Sequence[str] = ()
) -> str:
    """The `trtexec` command that builds the same plan.

    In its syntax each profile's shapes follow `--profile=N`. TensorRT-RTX's own tool is called `tensorrt_rtx`, knows
    strongly typed networks alone, and is told the compute capabilities; `trtexec` builds for the GPU it runs on.
    """
    tool, more = "trtexec", ["--stronglyTyped"]
    if engine == "rtx":
        named = ",".join(name.replace(".", "") for name in capabilities)
        tool, more = "tensorrt_rtx", [f"--computeCapabilities={named}"]
    words = [tool, f"--onnx={onnx}", f"--saveEngine={plan}", *more, "--skipInference"]
    for number, shapes in enumerate(profiles):
        words.append(f"--profile={number}")
        for place, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            listed = (f"{name}:{'x'.join(map(str, shape[place]))}" for name, shape in shapes.items())
            words.append(f"{option}={','.join(listed)}")
    return shlex.join(words)
