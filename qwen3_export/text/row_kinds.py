"""Rows of data sets as people have them, made into documents.

{"text": "…"}                                                     text
{"messages": [{"role": "user", "content": "…"}], "tools": […]}    a chat, content as text or as parts of text
{"conversations": [{"from": "human", "value": "…"}, …]}           ShareGPT
{"instruction": "…", "input": "…", "output": "…"}                 Alpaca, perhaps with system and history
{"prompt": "…", "completion": "…"}                                or response; texts, or lists of messages

A row may name its `domain`. The document records which keys became which roles, for the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_export.core.files import parse_json
from qwen3_export.text.messages import ROLES, read_message

# ShareGPT's speakers, by their role in a chat.
_SPEAKERS = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "model", "bot", "function_call"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response"),
}
_ROLE_OF = {speaker: role for role, speakers in _SPEAKERS.items() for speaker in speakers}
HINT = (
    'a row is {"text": "…"}, {"messages": [{"role": "user", "content": "…"}]}, ShareGPT\'s conversations, '
    "Alpaca's instruction and output, or prompt and completion"
)


@dataclass(frozen=True)
class Document:
    """One text or one chat, with its domain.

    `tools` are those that the chat may call. `mapped` says which keys of the row became which roles; it is empty for
    rows that need no mapping.
    """

    domain: str
    content: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    mapped: str = ""


def document_of(item: Any, domain: str) -> Document:
    """The document in a row; TypeError, KeyError or ValueError when there is none."""
    if not isinstance(item, dict):
        raise TypeError("no JSON object")
    domain = str(item.get("domain") or domain)
    if item.get("messages") is not None:
        return _chat(domain, item["messages"], item)
    if item.get("conversations") is not None:
        return _share_gpt(domain, item)
    if item.get("instruction") is not None:
        return _alpaca(domain, item)
    if item.get("prompt") is not None:
        return _prompt(domain, item)
    text = _text(item["text"], "text")
    text.encode()  # half a surrogate pair is valid JSON but cannot be text
    return Document(domain, text)


def _chat(domain: str, messages: Any, item: Mapping[str, Any], mapped: str = "") -> Document:
    if not isinstance(messages, list) or not messages:
        raise TypeError("messages is no list with a message")
    tools = item.get("tools")
    tools = parse_json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise TypeError("tools is no list of objects")
    chat = [read_message(message) for message in messages]
    for message in chat:
        # Qwen3's template would leave the message out without a word.
        if message["role"] not in ROLES:
            raise ValueError(f"a message has the role {message['role']!r}; one of {', '.join(ROLES)} was expected")
    json.dumps([chat, tools], ensure_ascii=False).encode()
    return Document(domain, chat, tools or None, mapped)


def _share_gpt(domain: str, item: Mapping[str, Any]) -> Document:
    turns = item["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise TypeError("conversations is no list of objects")
    if turns and all("role" in turn for turn in turns):
        return _chat(domain, turns, item)
    messages = [{"role": "system", "content": item["system"]}] if item.get("system") else []
    found: dict[str, str] = {}
    for turn in turns:
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _ROLE_OF:
            raise ValueError(f"a turn is from {speaker!r}; one of {', '.join(_ROLE_OF)} was expected")
        found[speaker] = _ROLE_OF[speaker]
        value = _text(turn.get("value"), "value")
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": [parse_json(value, "function_call")]})
        else:
            messages.append({"role": _ROLE_OF[speaker], "content": value})
    return _chat(domain, messages, item, ", ".join(f"{speaker} → {role}" for speaker, role in sorted(found.items())))


def _alpaca(domain: str, item: Mapping[str, Any]) -> Document:
    answer = "output" if "output" in item else "response"
    question = _text(item["instruction"], "instruction")
    if given := _text(item.get("input") or "", "input"):
        question = f"{question}\n{given}"
    messages = [{"role": "system", "content": item["system"]}] if item.get("system") else []
    history = item.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise TypeError("history is no list of pairs")
    for asked, told in [*history, (question, item[answer])]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return _chat(domain, messages, {}, f"instruction and input → user, {answer} → assistant")


def _prompt(domain: str, item: Mapping[str, Any]) -> Document:
    answer = "completion" if "completion" in item else "response"
    mapped, messages = f"prompt → user, {answer} → assistant", []
    for key, role in (("prompt", "user"), (answer, "assistant")):
        value = item[key]
        if isinstance(value, list):
            mapped = f"prompt and {answer} → one chat"
            messages += value
        else:
            messages.append({"role": role, "content": _text(value, key)})
    return _chat(domain, messages, item, mapped)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value
