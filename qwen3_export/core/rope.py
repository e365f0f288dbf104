"""Rotary position embedding (Su et al. 2021) with YaRN (Peng et al. 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.config_values import read_flag, read_number, read_size
from qwen3_export.errors import CheckpointError, InputWarning


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; `factor` and what follows are YaRN's (Peng et al. 2023)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float32]:
        """Rotation speed of each of the `head_dim / 2` pairs, in radians per position."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1.0) / np.power(np.float32(self.theta), exponents)
        if self.kind == "default":
            return plain
        low, high = (self._pair_with_turns(turns, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 0.001))
        keep = np.float32(1.0) - np.clip(ramp, 0, 1).astype(np.float32)
        return plain / np.float32(self.factor) * (1 - keep) + plain * keep

    def _pair_with_turns(self, turns: float, head_dim: int) -> float:
        """Index of the pair that makes this many full turns over the original context."""
        ratio = self.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(self.theta))

    def cos_sin(self, head_dim: int, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Tables `[positions, head_dim / 2]`, YaRN's attention factor multiplied in."""
        angles = np.arange(positions, dtype=np.float32)[:, None] * self.inverse_frequencies(head_dim)
        scale = np.float32(self.attention_factor)
        return np.cos(angles) * scale, np.sin(angles) * scale


def read_rope(values: Mapping[str, Any], where: str) -> Rope:
    """The `Rope` of a `config.json`.

    Releases 4.x of transformers write `rope_theta` and `rope_scaling`, releases 5.x write `rope_parameters`. A file may
    hold both. Raises CheckpointError when they disagree or ask for a kind that no Qwen3 model uses.
    """
    given = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    if not all(isinstance(item, dict) for item in given):
        raise CheckpointError(f"{where}: rope_parameters and rope_scaling must be objects")
    thetas = [item["rope_theta"] for item in (values, *given) if item.get("rope_theta") is not None]
    ropes = [_one_rope({**values, "rope_theta": t}, item, where) for t in thetas or [10000.0] for item in given or [{}]]
    if any(rope != ropes[0] for rope in ropes):
        raise CheckpointError(
            f"{where}: rope_theta, rope_scaling and rope_parameters contradict each other",
            "releases of transformers would read different models from it: keep only what the model was trained with",
        )
    return ropes[0]


def _one_rope(values: Mapping[str, Any], scaling: Mapping[str, Any], where: str) -> Rope:
    theta = read_number(values, "rope_theta", where, None)
    if {**values, **scaling}.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(f"{where}: partial_rotary_factor is not supported (no published Qwen3 model uses it)")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported; default and yarn are")
    if "attn_factor" in scaling:
        # transformers warns in the same case, and takes YaRN's own factor too.
        warnings.warn(
            f"{where}: attn_factor beside YaRN is read by nobody; what is meant may be attention_factor",
            InputWarning,
            stacklevel=2,
        )
    original = read_size(scaling, "original_max_position_embeddings", where, values.get("max_position_embeddings"))
    factor = read_number(scaling, "factor", where, None)
    if theta <= 1:
        raise CheckpointError(f"{where}: rope_theta is {theta}, yarn needs one above 1")
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=read_number(scaling, "beta_fast", where, 32.0),
        beta_slow=read_number(scaling, "beta_slow", where, 1.0),
        attention_factor=read_number(scaling, "attention_factor", where, _yarn_attention(scaling, factor, where)),
        truncate=read_flag({"truncate": True, **scaling}, "truncate", where),
    )


def _yarn_attention(scaling: Mapping[str, Any], factor: float, where: str) -> float:
    """YaRN's own attention factor; with `mscale` and `mscale_all_dim` both given, their ratio."""
    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        return _yarn_scale(factor, 1.0)
    above, below = (_yarn_scale(factor, read_number(scaling, key, where, None)) for key in ("mscale", "mscale_all_dim"))
    return above / below


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
