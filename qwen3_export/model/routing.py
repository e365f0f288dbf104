"""The router's choice of experts, as the model makes it or smoothed by noise.

The choice jumps where two experts are equally probable, so it has no slope there. With Gaussian noise on the logits
the last chosen expert and the first one left out change places with a probability p that does not jump:

    mean weights = (1 − p) · weights of the choice + p · weights with the two exchanged
    p            = Φ(−distance of their logits / deviation of the noise)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen3_export.core.qwen3 import Qwen3Config


def route(logits: Tensor, config: Qwen3Config, noise: float = 0.0) -> dict[str, Tensor]:
    """Each token's `experts` and their weights `mix`, `[…, k]`, from fp32 logits `[…, experts]`.

    They are the top k of a softmax over all. With `noise`, a share of the logits' root mean square around their mean,
    there is one expert more and the weights are the mean ones.
    """
    count = config.experts_per_token
    if noise and count < config.num_experts:
        return _smoothed(logits, count, config.norm_topk_prob, noise)
    mix, experts = logits.softmax(-1).topk(count, dim=-1)
    return {"experts": experts, "mix": mix / mix.sum(-1, keepdim=True) if config.norm_topk_prob else mix}


def _smoothed(logits: Tensor, count: int, normalised: bool, noise: float) -> dict[str, Tensor]:
    probabilities, experts = logits.softmax(-1).topk(count + 1, dim=-1)
    around = (logits - logits.mean(-1, keepdim=True)).detach()
    deviation = noise * around.square().mean().sqrt() * math.sqrt(2)
    distance = probabilities[..., count - 1].log() - probabilities[..., count].log()
    swapped = (0.5 * torch.erfc(distance / deviation)).unsqueeze(-1)
    usual, other = torch.ones(2, count + 1, device=logits.device)
    usual[count], other[count - 1] = 0.0, 0.0
    weights = [probabilities * chosen for chosen in (usual, other)]
    if normalised:
        weights = [each / each.sum(-1, keepdim=True) for each in weights]
    return {"experts": experts, "mix": (1 - swapped) * weights[0] + swapped * weights[1]}
