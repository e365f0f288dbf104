"""Other tools' quantization_config: wrong types, endless patterns, unknown methods."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.damage import change_json, dump_json, odd
from tests.hostile.trial import Place, Trial, read_json

_PATTERNS = (
    "re:(.+)+x$",
    "re:(a|a)*b",
    "re:(.*.*.*.*.*.*)*y",
    "re:(",
    "re:[",
    "re:" + "(" * 2000,
    "re:a{1,65535}{1,65535}",
    "re:(?=(?=(?=.*)*)*)*z",
    "re:" + "a?" * 300 + "a" * 300,
    "re:\\1",
    "re:.*",
    "re:",
    "Linear",
)
_METHODS: tuple[dict[str, Any], ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "dynamic": {"(.+)+x$": {"bits": 8}}},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:(.*.*.*.*)*y": {}}},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round"},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "torchao"},
)


def make(random: Random, place: Place) -> Trial:
    """A quantized folder that claims to be another tool's, or has an odd configuration."""
    folder = place.copy("quantized")
    if random.random() < 0.7:
        (folder / "qwen3-export.json").unlink()
    path = folder / "config.json"
    values = read_json(path)
    what = _change(random, values)
    path.write_bytes(dump_json(values))
    if random.random() < 0.15:
        what += _fallback(random, folder)
    command = random.choice(
        (("inspect", folder), ("run", folder, "--prompt", "hi", "--max-new-tokens", "1"), ("onnx", folder))
    )
    if command[0] == "onnx":
        return Trial(what, (*command, "--output", place.out), outputs=(place.out,))
    return Trial(what, command)


def _change(random: Random, values: dict[str, Any]) -> str:
    config = values["quantization_config"]
    roll = random.random()
    if roll < 0.35:
        pattern = random.choice(_PATTERNS)
        if random.random() < 0.5:
            config["ignore"] = [pattern, *config.get("ignore", [])]
        else:
            next(iter(config["config_groups"].values()))["targets"] = [pattern]
        return f"pattern {pattern[:30]!r}"
    if roll < 0.6:
        values["quantization_config"] = random.choice(_METHODS)
        return f"{values['quantization_config']}"[:60]
    if roll < 0.7:
        values["quantization_config"] = odd(random)
        return f"quantization_config is {ascii(values['quantization_config'])[:40]}"
    return change_json(random, config)


def _fallback(random: Random, folder: Path) -> str:
    name = random.choice(("quantize_config.json", "hf_quant_config.json"))
    value = random.choice(({"quantization": {"quant_algo": "FP8"}}, {"quantization": 3}, {"bits": 4}, [], 3))
    (folder / name).write_text(json.dumps(value))
    return f", {name} is {value}"
