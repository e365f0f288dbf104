"""Where drift comes from: original and artifact run side by side, block by block.

    hidden states   ‖h' − h‖ / ‖h‖ after every block, each model on its own states: the accumulated error
    own             the same, with the original's states as the block's input: the error of this block alone
    linears         ‖x (W' − W)ᵀ‖ / ‖x Wᵀ‖ on the original's inputs x; for experts on their own tokens
    channels        the channels of the hidden state with the largest shares of the accumulated error

Both models are read one block at a time, in torch. Errors are ratios of sums over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_export.core.architecture import expert_of, is_expert
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import block_name
from qwen3_export.errors import InputError
from qwen3_export.text.samples import Samples, subsample

if TYPE_CHECKING:
    from torch import Tensor

    from qwen3_export.model.block import Block

TOKENS, _WORST_LINEARS, _WORST_CHANNELS = 4096, 20, 5


@dataclass
class _Sums:
    """Sums of squared errors and squared norms over samples, by name."""

    error: dict[str, float] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor, original: Tensor) -> None:
        difference = (ours - original).double()
        self.error[name] = self.error.get(name, 0.0) + float((difference * difference).sum())
        self.size[name] = self.size.get(name, 0.0) + float((original.double() ** 2).sum())
        self.tokens[name] = self.tokens.get(name, 0) + original.reshape(-1, original.shape[-1]).shape[0]

    def relative(self, name: str) -> float:
        size = self.size.get(name, 0.0)
        return (self.error[name] / size) ** 0.5 if size else 0.0


def check_explainable(artifact: Path) -> None:
    """Raise InputError for an artifact that is no Hugging Face folder."""
    if artifact.is_file() or not (artifact / "config.json").is_file() or list(artifact.glob("*.onnx")):
        raise InputError(
            f"--explain: {artifact} is no Hugging Face folder",
            "explain the quantized folder that it was exported from: its codes are the same",
        )


def explain(
    original: Checkpoint, artifact: Checkpoint, samples: Samples, progress: Progress | None = None
) -> dict[str, Any]:
    """Errors per block, linear, expert and channel, as a `validate` result's `explain`."""
    import torch

    from qwen3_export.model.decoder import load_block, rope_tables

    if original.config.tensor_shapes() != artifact.config.tensor_shapes():
        raise InputError(f"--explain: {artifact.name} has other shapes than {original.name}")
    chosen = subsample(samples, TOKENS)
    config, folded = original.config, _is_folded(original, artifact)
    blocks: list[dict[str, Any]] = []
    linears, channels = _Sums(), list[dict[str, Any]]()
    with torch.no_grad(), (progress or Progress()).bar(f"explain {artifact.name}", config.num_layers) as tick:
        ours, theirs = (_embedded(checkpoint, chosen) for checkpoint in (artifact, original))
        ropes = [rope_tables(config, 0, len(ids)) for ids in chosen.ids]
        for layer in range(config.num_layers):
            block, other = load_block(original, layer), load_block(artifact, layer)
            sums, worst = _Sums(), np.zeros(config.hidden_size)
            for i, rope in enumerate(ropes):
                if not folded:
                    _add_linears(linears, block, other, theirs[i], rope)
                alone = other.forward(theirs[i], rope)
                ours[i], theirs[i] = other.forward(ours[i], rope), block.forward(theirs[i], rope)
                sums.add("own", alone, theirs[i])
                sums.add("all", ours[i], theirs[i])
                worst += ((ours[i] - theirs[i]).double() ** 2).sum((0, 1)).numpy()
            blocks.append({"block": layer, "error": sums.relative("all"), "own_error": sums.relative("own")})
            channels += _channels(layer, worst)
            tick()
    return {
        "tokens": chosen.tokens,
        "folded": folded,
        "blocks": blocks,
        "channels": sorted(channels, key=lambda item: -item["share"])[:_WORST_LINEARS],
        **_named_errors(linears),
    }


def _embedded(checkpoint: Checkpoint, samples: Samples) -> list[Tensor]:
    """Hidden states before the first block, `[1, tokens, hidden]` each."""
    from qwen3_export.model.table import open_tables

    table, _ = open_tables(checkpoint, expand=False)
    return [table.rows(ids)[None] for ids in samples.ids]


def _is_folded(original: Checkpoint, artifact: Checkpoint) -> bool:
    """Whether scales were folded, so that single linears cannot be compared."""
    for layer in range(original.config.num_layers):
        for name in original.config.other_shapes(layer):
            tensor = f"{block_name(layer)}.{name}.weight"
            if not np.array_equal(original.read(tensor), artifact.read(tensor)):
                return True
    return False


def _add_linears(sums: _Sums, block: Block, other: Block, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> None:
    """Compare every linear of both blocks on the original's inputs."""
    state = block.initial_state(hidden)
    for number, stage in enumerate(block.stages):
        for linear in block.config.linear_shapes(block.layer):
            if block.config.block(block.layer).stage_of(linear) != stage:
                continue
            x = block.inputs_of(linear, state)
            if len(x):
                sums.add(f"{block_name(block.layer)}.{linear}", other.linear(linear, x), block.linear(linear, x))
        state = block.advance(number, state, rope)


def _channels(layer: int, errors: np.ndarray) -> list[dict[str, Any]]:
    """The worst channels of the hidden state, with their shares of the error."""
    total = float(errors.sum())
    order = np.argsort(-errors)[:_WORST_CHANNELS]
    return [{"block": layer, "channel": int(i), "share": float(errors[i] / total) if total else 0.0} for i in order]


def _named_errors(sums: _Sums) -> dict[str, list[dict[str, Any]]]:
    """The linears and the experts with the largest errors."""
    found: list[dict[str, Any]] = [
        {"name": name, "error": sums.relative(name), "tokens": sums.tokens[name]} for name in sums.error
    ]
    experts: dict[tuple[int, int], list[str]] = {}
    for name in filter(is_expert, sums.error):
        layer = int(name.removeprefix("model.layers.").partition(".")[0])
        experts.setdefault((layer, expert_of(name)), []).append(name)
    named: list[dict[str, Any]] = [
        {
            "layer": layer,
            "expert": expert,
            "error": (sum(sums.error[n] for n in names) / max(sum(sums.size[n] for n in names), 1e-30)) ** 0.5,
            "tokens": max(sums.tokens[n] for n in names),
        }
        for (layer, expert), names in experts.items()
    ]
    return {
        "linears": sorted(found, key=lambda item: -item["error"])[:_WORST_LINEARS],
        "experts": sorted(named, key=lambda item: -item["error"])[:_WORST_LINEARS],
    }
