"""Tokenizer, template and generation files, damaged for the tokenizers library and jinja."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.damage import change_json_file
from tests.hostile.trial import Place, Trial, read_json

_FILES = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def make(random: Random, place: Place) -> Trial:
    """A folder with a damaged tokenizer, and a command that reads text with it."""
    folder = place.copy(random.choice(("model", "onnx")))
    if random.random() < 0.3:
        what = _settings(random, folder / "tokenizer.json")
    else:
        what = change_json_file(random, folder / random.choice(_FILES))
    if folder.name == "onnx" or random.random() < 0.3:
        return Trial(what, ("run", folder, "--prompt", "Hello, ocean.", "--max-new-tokens", "2"))
    command: tuple[object, ...] = random.choice(
        (
            ("gguf", folder),
            ("onnx", folder),
            ("reference", folder, "--tokens", "64", "--window", "32"),
            ("quantize", folder, "--recipe", "gptq-w4a16-g32", "--samples", "2", "--sequence-length", "16"),
        )
    )
    return Trial(what, (*command, "--output", place.out), outputs=(place.out,))


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


# Key → values that make the tokenizers library panic, hang or fill the memory.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}},
    {"truncation": {"direction": "Right", "max_length": 0, "strategy": "OnlySecond", "stride": 0}},
    {
        "padding": {
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    },
    {"normalizer": {"type": "Sequence", "normalizers": [_replace({"String": "a"}, "a" * 20)] * 12}},
    {"normalizer": _replace({"Regex": "(a+)+$"}, "b")},
    {"normalizer": _replace({"String": ""}, "b" * 1000)},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"decoder": {"type": "Sequence", "decoders": [_replace({"String": "a"}, "a" * 20)] * 12}},
    {"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
    {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "é": 1, "aé": 2},
            "merges": ["a é"],
            "continuing_subword_prefix": "éé",
        }
    },
)


def _settings(random: Random, path: Path) -> str:
    setting = random.choice(SETTINGS)
    path.write_text(json.dumps({**read_json(path), **setting}))
    return f"tokenizer.json: {str(setting)[:60]}"
