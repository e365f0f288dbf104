"""A checkpoint's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core import tokenizer_files
from qwen3_export.core.files import read_sidecar, read_text
from qwen3_export.core.tokenizer_files import TOKENIZER
from qwen3_export.errors import CheckpointError
from qwen3_export.text.chat_template import render_chat
from qwen3_export.text.tokenizer_checks import failures, refusal, unheard


class TextModel(Protocol):
    """A tokenizer with its chat template: `ModelTokenizer`, or a runtime's own."""

    @property
    def template(self) -> str | None:
        """The chat template's Jinja text, or None."""

    @property
    def tool_template(self) -> str | None:
        """The chat template for chats with tools, where it is another one."""

    def template_place(self, tools: bool = False) -> str:
        """Where the chat template stands, or that for chats with tools."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens as texts by role, which chat templates may use."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text.

        Special tokens written in it are recognised, none are added.
        """

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""

    def stop_ids(self) -> set[int]:
        """Ids that end a generation."""


def chat_text(
    tokenizer: TextModel,
    messages: list[dict[str, Any]],
    generate: bool = False,
    thinking: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """A chat as text by a model's own template; see `render_chat`."""
    special = tokenizer.tool_template if tools else None
    template, place = special or tokenizer.template, tokenizer.template_place(bool(special))
    return render_chat(template, messages, generate, thinking, tools, tokenizer.special_tokens, place)


class ModelTokenizer:
    """The tokenizer and the chat template of a checkpoint or artifact folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer = _load(folder)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text.

        Special tokens written in it are recognised, none are added.
        """
        with failures(self.folder / TOKENIZER):
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @property
    def ordinary_tokens(self) -> int:
        """Number of tokens that are no special ones; they come first."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self._special)]
        with failures(self.folder / TOKENIZER):
            return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    @cached_property
    def _special(self) -> set[int]:
        """Ids of special tokens; where two files differ, tokenizer_config.json decides, as in transformers."""
        flags = {i: token.special for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        flags.update(tokenizer_files.added_token_flags(read_sidecar(self.folder / tokenizer_files.CONFIG)))
        return {i for i, special in flags.items() if special}

    @cached_property
    def _templates(self) -> dict[str, str]:
        return tokenizer_files.chat_templates(self.folder)

    @property
    def template(self) -> str | None:
        """The chat template's Jinja text, or None for a base model without one."""
        return self._templates.get("default")

    @property
    def tool_template(self) -> str | None:
        """The chat template for chats with tools, where it is another one."""
        return self._templates.get("tool_use")

    def template_place(self, tools: bool = False) -> str:
        """The file that holds the chat template, or that for chats with tools."""
        return str(tokenizer_files.template_place(self.folder, "tool_use" if tools else "default"))

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens as texts, by role."""
        return tokenizer_files.special_tokens(self.folder)

    def stop_ids(self) -> set[int]:
        """Ids that end a generation; see `core.tokenizer_files.stop_ids`."""
        return set(tokenizer_files.stop_ids(self.folder, self._tokenizer.token_to_id))


def _load(folder: Path) -> Any:
    """The folder's tokenizer with truncation and padding turned off; CheckpointError when broken."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if path.is_file():
        text = read_text(path, CheckpointError)
    else:
        text = json.dumps(tokenizer_files.tokenizer_values(folder), ensure_ascii=False)
    with failures(path), unheard():
        tokenizer = Tokenizer.from_str(text)
        # Truncation and padding are settings for training, or for batches of one length.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    if reason := refusal(tokenizer):
        raise CheckpointError(f"{path}: not a tokenizer that can be used ({reason})")
    return tokenizer
