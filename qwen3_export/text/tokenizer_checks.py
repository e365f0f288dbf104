"""Checks whether the tokenizers library can safely run a tokenizer.

With some files the library's Rust code panics, hangs or fills the memory. A tokenizer that is built like Qwen's is
accepted at once. Any other is first tried on odd texts in a process under limits (`core.confined`), which finds
replacements that multiply a text, patterns that never end, and settings that make the library panic.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from qwen3_export.core.confined import ConfinedError, confined
from qwen3_export.core.tokenizer_files import WORDS
from qwen3_export.errors import CheckpointError

_PLAIN = ("NFC", "NFD", "NFKC", "NFKD", "ByteLevel", "Digits", "Fuse")
_USUAL_KEYS = {"type", "add_prefix_space", "trim_offsets", "use_regex", "individual_digits"}
# Long runs of one character: slow for patterns, and multiplied by replacements.
_LETTERS = ("a", "x", "1", " ", "\n", "-", "é", "深")
PROBES = (
    *("", "ab1 -\n" * 80, "(x+x+)+y " * 40),
    *(letter * 400 for letter in _LETTERS),
    *(f"{letter * 60}!" for letter in _LETTERS),
)
_MOST_LONGER = 64


def refusal(tokenizer: Any) -> str | None:
    """Why a loaded tokenizer cannot be used; None when it can."""
    parts = [json.loads(part.__getstate__()) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part]
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None
    if all(map(_is_usual, parts)) and (decoder is None or _is_usual(decoder)):
        return None
    try:
        found: str | None = confined(probe)(tokenizer.to_str())
    except ConfinedError as error:
        return str(error)
    return found


@contextlib.contextmanager
def failures(where: object) -> Iterator[None]:
    """Turn whatever the library raises, a panic included, into one CheckpointError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, CheckpointError):
        raise
    except BaseException as error:  # PanicException is no Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{where}: not a tokenizer that can be used ({reason})") from error


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Hide standard error, where native code reports its panics."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _is_usual(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    if kind == "Sequence":
        inner: list[Any] = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), [])
        return all(map(_is_usual, inner))
    if kind == "Split":
        return bool(part.get("pattern") == {"Regex": WORDS})
    return kind in _PLAIN and part.keys() <= _USUAL_KEYS


def probe(text: str) -> str | None:
    """Run a tokenizer on odd texts; says why it cannot be used, or None."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
        for sample in PROBES:
            ids = tokenizer.encode(sample, add_special_tokens=False).ids
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            if max(len(ids), len(decoded)) > _MOST_LONGER * (len(sample) + 1):
                return f"it makes {max(len(ids), len(decoded))} of {len(sample)} letters"
    except BaseException as error:  # a panic is no Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the tokenizers library fails with it: {reason}"
    return None
