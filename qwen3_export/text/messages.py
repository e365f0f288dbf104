"""Messages of a chat: roles, and content as one text.

{"role": "user", "content": "…"}
{"role": "user", "content": [{"type": "text", "text": "…"}]}             parts, joined
{"role": "assistant", "tool_calls": [{"function": {"name": "…"}}]}       content may be absent
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_export.errors import InputError

# What Qwen3's chat template knows. It drops messages of other roles without a word.
ROLES = ("system", "user", "assistant", "tool")
_KINDS = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}


def read_chat(messages: Any) -> list[dict[str, Any]]:
    """The messages of a request, contents as texts.

    Raises InputError, which names the message, for what no chat template could take or would drop.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError('messages: a list of {"role": …, "content": …} was expected')
    chat = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        try:
            chat.append(read_message(message, where))
            json.dumps(chat[-1], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: half of a surrogate pair is in it, which is no text") from error
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        if (role := chat[-1]["role"]) not in ROLES:
            raise InputError(f"{where}.role: {role!r} is unknown; known are {', '.join(ROLES)}")
    return chat


def read_message(message: Any, where: str = "a message") -> dict[str, Any]:
    """A message whose content is one text; TypeError when it is not a message.

    Content may be absent where there are tool calls. Errors call the message `where`.
    """
    if not isinstance(message, dict):
        raise TypeError(f"{where}: an object was expected, found {_kind(message)}")
    calls, content = message.get("tool_calls") or [], message.get("content")
    content = "" if content is None and calls else _joined(content, f"{where}.content")
    _check_text(message.get("role"), f"{where}.role")
    if message.get("reasoning_content") is not None:
        _check_text(message["reasoning_content"], f"{where}.reasoning_content")
    for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TypeError(f"{where}: a tool call needs a function with a name")
    return {**message, "content": content}


def _joined(content: Any, where: str) -> str:
    """One text from a text or from parts, `[{"type": "text", …}, "…"]`."""
    if not isinstance(content, list):
        return _check_text(content, where)
    texts = []
    for number, part in enumerate(content):
        text, place = part, f"{where}[{number}]"
        if isinstance(part, dict):
            if part.get("type", "text") != "text":
                raise TypeError(f"{place}: text was expected, found {part['type']!r}")
            text, place = part.get("text"), f"{place}.text"
        texts.append(_check_text(text, place))
    return "".join(texts)


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where}: text was expected, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else "a text" if isinstance(value, str) else _KINDS.get(type(value), "another")
