"""Values of recipes that several tests share."""

from __future__ import annotations

from typing import Any

W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
LINEARS = {
    "model.layers.0.self_attn.q_proj": (128, 64),
    "model.layers.0.mlp.down_proj": (64, 96),
    "model.layers.1.mlp.down_proj": (64, 96),
}


def recipe_values(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "method": "rtn", "rules": [{"match": "*", "scheme": W4}], **changes}


def rules(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"match": match, "scheme": scheme} for match, scheme in pairs]
