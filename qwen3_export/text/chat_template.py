"""Chats as text, rendered by a model's own template as transformers renders them.

Keys that are None are left out of messages, and a thought is given under every name that templates read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwen3_export.core.confined import ConfinedError, confined
from qwen3_export.core.jinja_template import render, variables_of
from qwen3_export.errors import InputError

_REMEDY = "mend it, take the original model's, or remove it: without a template roles and texts are simply joined"
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str | None,
    messages: list[dict[str, Any]],
    generate: bool = False,
    thinking: bool = True,
    tools: list[dict[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    place: str | None = None,
) -> str:
    """A chat as text by a Jinja template.

    `generate` appends the assistant's opening, `thinking` is Qwen3's switch, `special_tokens` are texts by role,
    such as `bos_token`, `place` is where the template stands. Without a template (a base model) roles and contents are
    simply joined. InputError when the template fails or meets a limit.
    """
    if template is None:
        return "\n".join(map(_plain, messages)) + ("\nassistant: " if generate else "")
    given = [_message(message) for message in messages]
    variables = variables_of(given, generate, thinking, tools, special_tokens or {})
    try:
        text: str = confined(render)(template, variables)
    except ConfinedError as error:
        where = f"{place}: " if place else ""
        raise InputError(f"{where}the chat template failed: {error}", _REMEDY) from error
    return text


def _plain(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    parts = (message.get("reasoning_content"), message["content"], json.dumps(calls) if calls else None)
    return f"{message['role']}: " + "\n".join(part for part in parts if part)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it to the template."""
    given = {key: value for key, value in message.items() if value is not None}
    thought = next((given[key] for key in _THOUGHTS if key in given), None)
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}
