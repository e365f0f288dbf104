"""Text: the tokenizer, the chat template, and documents cut into rows of token ids.

Documents come as JSONL, plain text or Parquet. A line or row is one of

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}

with an optional `domain`. Chats are rendered with the model's own template, which decides where a
thought goes that stands in `reasoning_content` or as `<think>…</think>` in the content, and where an
answer without one gets the empty think block. Tool calls stand in `tool_calls`, tools in `tools`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import read_sidecar, read_text_sidecar
from qwen3_export.core.resources import resource
from qwen3_export.errors import CheckpointError, InputError, MissingRuntimeError

BUNDLED_CALIBRATION = "calibration/calibration.jsonl"
BUNDLED_HELDOUT = "calibration/heldout.jsonl"
_SHORTEST_WINDOW = 16
_THOUGHT = re.compile(r"<think>(?!\s*</think>)\s*\S")


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


@dataclass(frozen=True)
class Document:
    """One text or one chat, with the domain that it stands for, and the tools that a chat may call."""

    domain: str
    content: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


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


def document_text(tokenizer: TextModel, document: Document) -> str:
    """A document as the model reads it, its chat rendered."""
    content = document.content
    return content if isinstance(content, str) else render_chat(tokenizer.template, content, tools=document.tools)


def document_ids(tokenizer: TextModel, document: Document) -> NDArray[np.int32]:
    """Token ids of a document, its chat rendered."""
    return tokenizer.encode(document_text(tokenizer, document))


def form_of(text: str, is_chat: bool) -> str:
    """`text`, `chat`, or `chat-thinking` when a rendered chat holds a thought that is not empty."""
    return ("chat-thinking" if _THOUGHT.search(text) else "chat") if is_chat else "text"


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


@dataclass(frozen=True)
class Rows:
    """Token rows with their domains, the hash of exactly these ids, and how many documents of each
    form (see `form_of`) the rows were cut from, where that is known."""

    ids: tuple[NDArray[np.int32], ...]
    domains: tuple[str, ...]
    documents: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens in total."""
        return sum(len(row) for row in self.ids)

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids, row lengths included."""
        digest = hashlib.sha256()
        for row in self.ids:
            digest.update(len(row).to_bytes(8, "little") + row.astype("<i4").tobytes())
        return digest.hexdigest()


def calibration_rows(tokenizer: TextModel, documents: list[Document], samples: int, length: int, seed: int) -> Rows:
    """At most `samples` rows of exactly `length` tokens, spread evenly over the domains.

    The documents of a domain are shuffled, joined and cut; rows are then taken from the domains in
    turn. Fewer rows come back when the text is too short; none at all is an InputError.
    """
    random = np.random.default_rng(seed)
    per_domain, forms = [], list[str]()
    for domain in sorted({document.domain for document in documents}):
        members = [document for document in documents if document.domain == domain]
        texts = [(document_text(tokenizer, members[i]), members[i]) for i in random.permutation(len(members))]
        pieces = [tokenizer.encode(text) for text, _ in texts]
        stream = np.concatenate(pieces)
        owners = np.repeat(np.arange(len(pieces)) + len(forms), [len(piece) for piece in pieces])
        forms += [form_of(text, not isinstance(document.content, str)) for text, document in texts]
        count = len(stream) // length
        rows, owned = (values[: count * length].reshape(count, length) for values in (stream, owners))
        per_domain.append([(rows[i], domain, owned[i]) for i in random.permutation(count)])
    chosen = [item for turn in _zip_longest(per_domain) for item in turn][:samples]
    if not chosen:
        raise InputError(
            f"the calibration text has fewer than {length} tokens in every domain",
            "give more text, or a smaller --sequence-length",
        )
    ids, domains, owned_by = zip(*chosen, strict=True)
    counted = Counter(forms[i] for i in np.unique(np.concatenate(owned_by)))
    return Rows(ids, domains, dict(sorted(counted.items())))


def _zip_longest(lists: list[list[Any]]) -> Iterator[list[Any]]:
    for turn in range(max(map(len, lists), default=0)):
        yield [items[turn] for items in lists if turn < len(items)]


def heldout_rows(tokenizer: TextModel, documents: list[Document], length: int) -> Rows:
    """Every document cut into windows of at most `length` tokens, tails under 16 tokens dropped."""
    ids, domains = [], []
    for document in documents:
        tokens = document_ids(tokenizer, document)
        for begin in range(0, len(tokens), length):
            window = tokens[begin : begin + length]
            if len(window) >= _SHORTEST_WINDOW:
                ids.append(window)
                domains.append(document.domain)
    if not ids:
        raise InputError("the held-out text has no window of 16 tokens", "give more text with --text")
    return Rows(tuple(ids), tuple(domains))


def spread(rows: Rows, tokens: int | None) -> Rows:
    """At most `tokens` tokens of the rows, whole rows, taken evenly over the text and its domains."""
    if tokens is None or rows.tokens <= tokens:
        return rows
    count = max(1, len(rows.ids) * tokens // rows.tokens)
    chosen = np.linspace(0, len(rows.ids) - 1, count).astype(int)
    return Rows(tuple(rows.ids[i] for i in chosen), tuple(rows.domains[i] for i in chosen))


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
