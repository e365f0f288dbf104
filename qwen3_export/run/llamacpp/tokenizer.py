"""llama.cpp's own tokenizer, from the vocabulary in a GGUF file."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Special tokens by transformers' names and by GGUF's, which spells the separator in its own way.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def header_value(lib: C.CDLL, model: Any, key: str) -> str | None:
    """A value of a GGUF file's header as text, None when absent."""
    buffer = C.create_string_buffer(4096)
    length = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if length >= 0 else None


class LlamaTokenizer:
    """See `text.tokenizer.TextModel`; usable while its session is open."""

    def __init__(self, lib: C.CDLL, model: Any, vocab_size: int) -> None:
        self._lib, self._model, self._size = lib, model, vocab_size
        self._vocab = lib.llama_model_get_vocab(model)

    @property
    def template(self) -> str | None:
        """The chat template in the file, or None."""
        text = self._lib.llama_model_chat_template(self._model, None)
        return text.decode("utf-8", "replace") if text else None

    @property
    def tool_template(self) -> str | None:
        """The chat template for chats with tools, where it is another one."""
        text = self._lib.llama_model_chat_template(self._model, b"tool_use")
        return text.decode("utf-8", "replace") if text else None

    def template_place(self, tools: bool = False) -> str:
        """Where the chat template stands: in the header."""
        return f"the GGUF file's metadata (tokenizer.chat_template{'.tool_use' if tools else ''})"

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens as texts, by role, that the file names."""
        texts = {
            role: header_value(self._lib, self._model, f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()
        }
        ids = {role: int(text) for role, text in texts.items() if text is not None and text.isdigit()}
        return {
            f"{role}_token": self._piece(token, True).decode("utf-8", "replace")
            for role, token in ids.items()
            if token < self._size
        }

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text.

        Special tokens written in it are recognised, none are added.
        """
        raw = text.encode()
        ids = np.empty(len(raw) + 8, np.int32)
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids.ctypes.data, len(ids), False, True)
        return ids[:count].copy()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return b"".join(self._piece(int(i), not skip_special) for i in ids).decode("utf-8", "replace")

    def _piece(self, token: int, special: bool) -> bytes:
        buffer = C.create_string_buffer(256)
        length = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(length, 0)]

    def stop_ids(self) -> set[int]:
        """Ids that end a generation."""
        return {token for token in range(self._size) if self._lib.llama_vocab_is_eog(self._vocab, token)}
