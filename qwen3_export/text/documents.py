"""Documents: texts and chats, from files or a hub data set.

Files are JSONL, JSON, plain text or Parquet.

`text.row_kinds` lists the kinds of lines or rows that are understood. Chats are rendered with the model's own template.
A thought may be in `reasoning_content` or as `<think>…</think>` in the content; the template decides where it goes, and
which answers without a thought get an empty think block. Tool calls are in `tool_calls`, tools in `tools`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.files import open_regular, parse_json, read_json, read_lines, read_text
from qwen3_export.core.memory import memory_named
from qwen3_export.core.resources import resource
from qwen3_export.errors import InputError, MissingRuntimeError, ResourceError
from qwen3_export.text.row_kinds import HINT, Document, document_of
from qwen3_export.text.tokenizer import TextModel, chat_text

__all__ = ["Document", "document_ids", "document_text", "form_of", "load_documents", "source_name"]
BUNDLED_CALIBRATION = "calibration/calibration.jsonl"
BUNDLED_HELDOUT = "calibration/heldout.jsonl"
_THOUGHT = re.compile(r"<think>(?!\s*</think>)\s*\S")


def document_text(tokenizer: TextModel, document: Document) -> str:
    """A document as the model reads it, its chat rendered."""
    content = document.content
    return content if isinstance(content, str) else chat_text(tokenizer, content, tools=document.tools)


def document_ids(tokenizer: TextModel, document: Document) -> NDArray[np.int32]:
    """Token ids of a document, its chat rendered."""
    return tokenizer.encode(document_text(tokenizer, document))


def form_of(text: str, is_chat: bool) -> str:
    """`text`, `chat`, or `chat-thinking` for a chat with a thought that is not empty."""
    return ("chat-thinking" if _THOUGHT.search(text) else "chat") if is_chat else "text"


def source_name(spec: str) -> str:
    """A source of text in manifests: the keyword, or the file's name."""
    return spec if spec in ("bundled", "heldout", "self") or spec.startswith("hf:") else Path(spec).name


def split_domain(spec: str) -> tuple[str, str]:
    """`math=notes.txt` as ("math", "notes.txt"); no domain for an existing file."""
    domain, equals, rest = spec.partition("=")
    named = equals and re.fullmatch(r"[\w-]+", domain) and rest and not Path(os.path.expanduser(spec)).exists()
    return (domain, rest) if named else ("", spec)


def load_documents(spec: str) -> list[Document]:
    """Documents of `bundled`, `heldout`, a `.txt`/`.jsonl`/`.parquet` file or `hf:dataset[:split]`.

    `DOMAIN=` before any of them says which domain all its documents belong to.
    """
    domain, text = split_domain(spec)
    if domain:
        return [replace(document, domain=domain) for document in load_documents(text)]
    if spec == "bundled":
        return _read_jsonl(resource(BUNDLED_CALIBRATION))
    if spec == "heldout":
        return _read_jsonl(resource(BUNDLED_HELDOUT))
    if spec.startswith("hf:"):
        return _from_hub(spec[3:])
    path, read = _file_reader(spec)
    try:
        documents = read(path)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not documents:
        raise InputError(f"{path}: no text in it", HINT)
    return documents


def check_readable(spec: str) -> None:
    """Raise InputError for a file that is missing or of an unknown kind.

    Its text is not read.
    """
    text = split_domain(spec)[1]
    if text in ("bundled", "heldout", "self") or text.startswith("hf:"):
        return
    path, _ = _file_reader(text)
    try:
        open_regular(path).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _file_reader(spec: str) -> tuple[Path, Callable[[Path], list[Document]]]:
    """A text file's path, and what reads a file of its kind."""
    path = Path(os.path.expanduser(spec))
    readers = {
        **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
        **dict.fromkeys((".txt", ".md"), _read_text),
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise InputError(f"{spec}: unknown kind of text", f"known: bundled, hf:DATASET, {', '.join(readers)} files")
    return path, readers[path.suffix]


def _read_text(path: Path) -> list[Document]:
    text = read_text(path, most=None)
    return [Document(path.stem, text)] if text.strip() else []


def _read_jsonl(path: Path) -> list[Document]:
    """A row in every line, read one by one."""
    documents = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            documents.append(_document(parse_json(line, where, unique=True), path.stem, where))
    return documents


def _read_json(path: Path) -> list[Document]:
    """The rows of a JSON file: a list, one row, or one per line."""
    first = next((line for line in read_lines(path) if line.strip()), "")
    if first.rstrip().endswith("}") and first.lstrip().startswith("{"):
        return _read_jsonl(path)
    values = read_json(path, unique=True)
    rows = values if isinstance(values, list) else [values]
    return [_document(row, path.stem, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _document(row: Any, domain: str, where: str) -> Document:
    try:
        return document_of(row, domain)
    except KeyError as error:
        raise InputError(f"{where}: neither text nor messages (no {error.args[0]!r} in it)", HINT) from error
    except (ValueError, TypeError, RecursionError, InputError) as error:
        raise InputError(f"{where}: neither text nor messages ({error})", HINT) from error


def _read_parquet(path: Path) -> list[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingRuntimeError(
            f"{path}: reading Parquet needs pyarrow", "pip install 'qwen3-export[parquet]'"
        ) from error
    try:
        with memory_named(path), open_regular(path) as file:
            items = parquet.read_table(file).to_pylist()
    except ResourceError:
        raise
    except Exception as error:  # pyarrow's errors have no common base class below Exception
        raise InputError(f"{path}: not a Parquet file ({error})") from error
    return [_document(_without_nulls(row), path.stem, f"{path}, row {n}") for n, row in enumerate(items, 1)]


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that Parquet adds.

    All rows of a column share one structure; keys that a row does not have are null there.
    """
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
        with memory_named(f"hf:{spec}"):
            items = datasets.load_dataset(name, split=split or "train")
    except ResourceError:
        raise
    except Exception as error:  # an unreachable hub surfaces as many unrelated classes
        raise MissingRuntimeError(
            f"hf:{spec} cannot be loaded ({error})", "check the name and the network, or give a file instead"
        ) from error
    return [_document(_without_nulls(row), name, f"hf:{spec}, row {n}") for n, row in enumerate(items, 1)]
