"""A folder's tokenizer and generation files: vocabulary, special tokens, stop tokens, chat templates.

tokenizer.json           the vocabulary; without it vocab.json, merges.txt and added_tokens.json
tokenizer_config.json    special tokens as texts or AddedToken objects, chat templates
special_tokens_map.json  special tokens of older folders
chat_template.jinja      the chat template, before that of tokenizer_config.json
generation_config.json, config.json    ids that end an answer: a number or a list of them

Every file is read as transformers reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_object, read_sidecar, read_text
from qwen3_export.errors import CheckpointError

TOKENIZER, CONFIG, SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_VOCAB, _MERGES, _ADDED = "vocab.json", "merges.txt", "added_tokens.json"
ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Tokenizer classes whose constructors have defaults for these three tokens; Qwen3 uses Qwen2's class.
_QWEN_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3Tokenizer", "Qwen3TokenizerFast")
_QWEN_DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
# How Qwen's tokenizers cut text into words: the pattern of transformers' class and of every published tokenizer.json.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary in either form."""
    return any(os.path.lexists(folder / name) for name in (TOKENIZER, _VOCAB))


def tokenizer_values(folder: Path) -> dict[str, Any]:
    """The contents of tokenizer.json, made from vocab.json and merges.txt where it is missing."""
    if os.path.lexists(folder / TOKENIZER):
        return read_object(folder / TOKENIZER, CheckpointError)
    if not os.path.lexists(folder / _VOCAB):
        raise CheckpointError(
            f"{folder / TOKENIZER}: missing", "copy the tokenizer files of the original model into the folder"
        )
    vocab = read_object(folder / _VOCAB, CheckpointError)
    lines = read_text(folder / _MERGES, CheckpointError).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if not all(len(pair) == 2 for pair in merges):
        raise CheckpointError(f"{folder / _MERGES}: a line holds no pair of tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(folder, vocab),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
                _BYTES,
            ],
        },
        "post_processor": None,
        "decoder": _BYTES,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, **_BPE},
    }


_BPE = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _added_tokens(folder: Path, vocab: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Added tokens by id: those of tokenizer_config.json, else of added_tokens.json and the special tokens."""
    config, special = read_sidecar(folder / CONFIG), set(special_tokens(folder).values())
    stated = config.get("added_tokens_decoder")
    if isinstance(stated, dict) and stated:
        found = {_decimal(folder, index): _added(folder, token) for index, token in stated.items()}
    else:
        ids = read_sidecar(folder / _ADDED)
        ids.update({text: vocab[text] for text in special if text in vocab and text not in ids})
        found = {
            _id(folder / _ADDED, index): {"content": text, "special": text in special} for text, index in ids.items()
        }
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": index, **flags, "normalized": not token.get("special"), **token}
        for index, token in sorted(found.items())
    ]


def _decimal(folder: Path, index: str) -> int:
    if not (index.isascii() and index.isdigit()):
        raise CheckpointError(f"{folder / CONFIG}: added_tokens_decoder has the key {index!r}, an id was expected")
    return int(index)


def _id(path: Path, index: Any) -> int:
    if type(index) is not int or index < 0:
        raise CheckpointError(f"{path}: {index!r}, a token id was expected")
    return index


def _added(folder: Path, token: Any) -> dict[str, Any]:
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise CheckpointError(f"{folder / CONFIG}: added_tokens_decoder has {token!r}, a token was expected")
    return {key: token[key] for key in keys if key in token}


def added_token_flags(config: Mapping[str, Any]) -> dict[int, bool]:
    """Whether a token is special, by id, as tokenizer_config.json states it."""
    stated = config.get("added_tokens_decoder")
    items = stated.items() if isinstance(stated, dict) else ()
    return {
        int(index): bool(token.get("special", False)) if isinstance(token, dict) else False
        for index, token in items
        if index.isascii() and index.isdigit()
    }


def special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens as texts by role (`bos_token`, …); roles without a token are absent."""
    config = read_sidecar(folder / CONFIG)
    legacy = {} if config.get("added_tokens_decoder") else read_sidecar(folder / SPECIAL_MAP)
    given = {**(_QWEN_DEFAULTS if config.get("tokenizer_class") in _QWEN_CLASSES else {}), **config, **legacy}
    texts = {role: _text(folder, role, given.get(role)) for role in ROLES}
    return {role: text for role, text in texts.items() if text is not None}


def _text(folder: Path, role: str, token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None) or (text is None and token is not None):
        raise CheckpointError(f"{folder / CONFIG}: {role} is {token!r}, a text or an AddedToken was expected")
    return text


def stop_ids(folder: Path, id_of: Callable[[str], int | None]) -> list[int]:
    """Ids that end an answer, each once.

    They come from generation_config.json, from config.json, and from the tokenizer's eos_token, whose id `id_of` looks
    up. All three count, because fine-tuned models often have only one of them right. Raises CheckpointError for
    anything that is not an id.
    """
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json", "genai_config.json"):
        values = read_sidecar(folder / name)
        value = (_model(folder / name, values) if name.startswith("genai") else values).get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(
                f"{folder / name}: eos_token_id is {value!r}, a token id or a list of them was expected"
            )
        found.update(dict.fromkeys(ids))
    eos = special_tokens(folder).get("eos_token")
    # The tokenizer class's own default counts only where no file says anything.
    stated = "eos_token" in read_sidecar(folder / CONFIG) or "eos_token" in read_sidecar(folder / SPECIAL_MAP)
    index = id_of(eos) if eos and (stated or not found) else None
    if index is not None:
        found.setdefault(index)
    return list(found)


def _model(path: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object `model` of genai_config.json.

    In an exported ONNX folder it is the only file that has config.json's token ids.
    """
    found = values.get("model") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: model is {type(found).__name__}, an object was expected")
    return found


def id_lookup(folder: Path) -> Callable[[str], int | None]:
    """A function from token to id, None for an unknown token.

    The vocabulary is read at the first call.
    """

    @cache
    def ids() -> dict[str, int]:
        if not has_tokenizer(folder):
            return {}
        values = tokenizer_values(folder)
        model, added = values.get("model"), values.get("added_tokens")
        found = dict(model["vocab"]) if isinstance(model, dict) and isinstance(model.get("vocab"), dict) else {}
        for token in added if isinstance(added, list) else ():
            if isinstance(token, dict):
                found[str(token.get("content"))] = token.get("id")
        return {text: index for text, index in found.items() if type(index) is int}

    return lambda text: ids().get(text)


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """The sampling settings of generation_config.json; CheckpointError when one is no number."""
    path = folder / "generation_config.json"
    given, kinds = read_sidecar(path), {"do_sample": bool, "temperature": float, "top_k": int, "top_p": float}
    found = {key: given[key] for key in kinds if given.get(key) is not None}
    for key, value in found.items():
        right = type(value) is kinds[key] or (kinds[key] is float and type(value) is int)
        if not right or not 0 <= value < 1e9:
            raise CheckpointError(f"{path}: {key} is {value!r}, {kinds[key].__name__} was expected")
    return found


def special_id(folder: Path, role: str) -> int | None:
    """The id of `bos`, `pad` or another role, as generation_config.json or config.json gives it."""
    for name in ("generation_config.json", "config.json"):
        value = read_sidecar(folder / name).get(f"{role}_token_id")
        if value is not None:
            return _id(folder / name, value)
    return None


def template_place(folder: Path, name: str = "default") -> Path:
    """The file that holds the chat template of a name."""
    file = folder / "chat_template.jinja"
    if not os.path.lexists(file):
        return folder / CONFIG
    return file if name == "default" else folder / "additional_chat_templates" / f"{name}.jinja"


def chat_templates(folder: Path) -> dict[str, str]:
    """Chat templates by name, empty for a base model without one; `default` first."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {
            name: read_text(file, CheckpointError) for name, file in [("default", path), *((f.stem, f) for f in others)]
        }
    value = read_sidecar(folder / CONFIG).get("chat_template")
    listed = value if isinstance(value, list) else [] if value is None else [{"name": "default", "template": value}]
    texts = {}
    for item in listed:
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("name", "template")):
            raise CheckpointError(f"{folder / CONFIG}: chat_template is no text and no list of names and texts")
        texts[item["name"]] = item["template"]
    return texts
