"""A checkpoint's tokenizer and its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import read_sidecar, read_text_sidecar
from qwen3_export.errors import CheckpointError, InputError


class TextModel(Protocol):
    """What turns text into token ids and back: `ModelTokenizer`, or a runtime's own tokenizer."""

    @property
    def template(self) -> str | None:
        """The chat template's Jinja text, or None."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text; special tokens written in it are recognised, none are added."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""

    def stop_ids(self) -> set[int]:
        """Ids that end a generation."""


class ModelTokenizer:
    """The tokenizer and the chat template of a checkpoint or artifact folder."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: missing", "copy the tokenizer files of the original model into the folder")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text; special tokens written in it are recognised, none are added."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @property
    def ordinary_tokens(self) -> int:
        """Number of tokens that are no special ones; they come first."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self._special)]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    @cached_property
    def _special(self) -> set[int]:
        """Ids of special tokens; where the two files differ, transformers follows tokenizer_config.json."""
        flags = {str(i): token.special for i, token in self._tokenizer.get_added_tokens_decoder().items()}
        stated = self._config.get("added_tokens_decoder")
        for i, item in stated.items() if isinstance(stated, dict) else ():
            flags[i] = bool(item.get("special")) if isinstance(item, dict) else False
        return {int(i) for i, special in flags.items() if special and i.isdigit()}

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_sidecar(self.folder / "tokenizer_config.json")

    @cached_property
    def template(self) -> str | None:
        """The chat template's Jinja text, or None for a base model without one."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return read_text_sidecar(path)
        value = self._config.get("chat_template")
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            value = next((item.get("template") for item in value if item.get("name") == "default"), None)
        if not isinstance(value, str | None):
            raise CheckpointError(f"{self.folder / 'tokenizer_config.json'}: chat_template is no text")
        return value

    def stop_ids(self) -> set[int]:
        """Ids that end a generation, from `generation_config.json`."""
        path = self.folder / "generation_config.json"
        ids = read_sidecar(path).get("eos_token_id")
        if ids is None:
            eos = self._config.get("eos_token")
            ids = self._tokenizer.token_to_id(eos) if isinstance(eos, str) else None
        found = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int for token in found):
            raise CheckpointError(f"{path}: eos_token_id is {ids!r}, a token id or a list of them was expected")
        return set(found)


def render_chat(
    template: str | None,
    messages: list[dict[str, Any]],
    generate: bool = False,
    thinking: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """A chat as text by a Jinja template; `generate` appends the assistant's opening, `thinking` is
    Qwen3's switch. Without a template (a base model) roles and contents are simply joined."""
    if template is None:
        return "\n".join(map(_plain, messages)) + ("\nassistant: " if generate else "")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _template_error
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, tools=tools, add_generation_prompt=generate, enable_thinking=thinking)
    except Exception as error:  # a template is a program: it can fail in every way
        raise InputError(f"the chat template failed: {error}") from error


def _plain(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    parts = (message.get("reasoning_content"), message["content"], json.dumps(calls) if calls else None)
    return f"{message['role']}: " + "\n".join(part for part in parts if part)


def _template_error(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
