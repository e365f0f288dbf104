"""Documents: texts and chats from JSONL, plain text, Parquet or a hub data set.

Documents come as JSONL, plain text or Parquet. A line or row is one of

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}

with an optional `domain`. Chats are rendered with the model's own template, which decides where a
thought goes that stands in `reasoning_content` or as `<think>…</think>` in the content, and where an
answer without one gets the empty think block. Tool calls stand in `tool_calls`, tools in `tools`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.resources import resource
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.text.tokenizer import TextModel, chat_text

BUNDLED_CALIBRATION = "calibration/calibration.jsonl"
BUNDLED_HELDOUT = "calibration/heldout.jsonl"
_THOUGHT = re.compile(r"<think>(?!\s*</think>)\s*\S")


@dataclass(frozen=True)
class Document:
    """One text or one chat, with the domain that it stands for, and the tools that a chat may call."""

    domain: str
    content: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def document_text(tokenizer: TextModel, document: Document) -> str:
    """A document as the model reads it, its chat rendered."""
    content = document.content
    return content if isinstance(content, str) else chat_text(tokenizer, content, tools=document.tools)


def document_ids(tokenizer: TextModel, document: Document) -> NDArray[np.int32]:
    """Token ids of a document, its chat rendered."""
    return tokenizer.encode(document_text(tokenizer, document))


def form_of(text: str, is_chat: bool) -> str:
    """`text`, `chat`, or `chat-thinking` when a rendered chat holds a thought that is not empty."""
    return ("chat-thinking" if _THOUGHT.search(text) else "chat") if is_chat else "text"


def source_name(spec: str) -> str:
    """What a manifest calls a source of text: its keyword, or a file's name without the folders before it."""
    return spec if spec in ("bundled", "heldout", "self") or spec.startswith("hf:") else Path(spec).name


def load_documents(spec: str) -> list[Document]:
    """Documents of `bundled`, `heldout`, a `.txt`/`.jsonl`/`.parquet` file or `hf:dataset[:split]`."""
    if spec == "bundled":
        return _read_jsonl(resource(BUNDLED_CALIBRATION))
    if spec == "heldout":
        return _read_jsonl(resource(BUNDLED_HELDOUT))
    if spec.startswith("hf:"):
        return _from_hub(spec[3:])
    path = Path(os.path.expanduser(spec))
    readers = {".jsonl": _read_jsonl, ".txt": _read_text, ".md": _read_text, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"{spec}: unknown kind of text", f"known: bundled, hf:DATASET, {', '.join(readers)} files")
    try:
        documents = readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not documents:
        raise InputError(f"{path}: no text in it", 'a line is {"text": …} or {"messages": […]}')
    return documents


def _read_text(path: Path) -> list[Document]:
    text = path.read_text(encoding="utf-8")
    return [Document(path.stem, text)] if text.strip() else []


def _read_jsonl(path: Path) -> list[Document]:
    documents = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                documents.append(_document(json.loads(line), path.stem))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number}: neither text nor messages ({error})",
                    'a line is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
                ) from error
    return documents


def _document(item: Any, domain: str) -> Document:
    if not isinstance(item, dict):
        raise TypeError("no JSON object")
    domain = str(item.get("domain") or domain)
    messages = item.get("messages")
    if messages is None:
        if not isinstance(item["text"], str):
            raise TypeError("text is no string")
        item["text"].encode()  # half a surrogate pair is valid JSON and no text
        return Document(domain, item["text"])
    if not isinstance(messages, list) or not messages:
        raise TypeError("messages is no list with a message")
    tools = item.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise TypeError("tools is no list of objects")
    chat = [_message(message) for message in messages]
    json.dumps([chat, tools], ensure_ascii=False).encode()
    return Document(domain, chat, tools or None)


def _message(message: Any) -> dict[str, Any]:
    """A message with text as its content, which beside tool calls may be absent; TypeError when it is none."""
    if not isinstance(message, dict):
        raise TypeError("a message is no JSON object")
    calls = message.get("tool_calls") or []
    content = message.get("content")
    content = "" if content is None and calls else content
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise TypeError("a message needs a role and a content, both text")
    if not isinstance(message.get("reasoning_content"), str | None):
        raise TypeError("reasoning_content is no string")
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise TypeError("a tool call needs a function with a name")
    return {**message, "content": content}


def _read_parquet(path: Path) -> list[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingRuntimeError(
            f"{path}: reading Parquet needs pyarrow", "pip install 'qwen3-export[parquet]'"
        ) from error
    try:
        items = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's errors share no public base below Exception
        raise InputError(f"{path}: not a Parquet file ({error})") from error
    try:
        return [_document(_without_nulls(item), path.stem) for item in items]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a 'text' or 'messages' column was expected ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Without the nulls that fill a column's common struct: in JSON the keys would simply be absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _from_hub(spec: str) -> list[Document]:
    name, _, split = spec.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise MissingRuntimeError(f"hf:{spec} needs the datasets library", "pip install datasets") from error
    try:
        items = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # an unreachable hub surfaces as many unrelated classes
        raise MissingRuntimeError(
            f"hf:{spec} cannot be loaded ({error})", "check the name and the network, or give a file instead"
        ) from error
    try:
        return [_document(_without_nulls(item), name) for item in items]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"hf:{spec}: a 'text' or 'messages' column was expected ({error})") from error
