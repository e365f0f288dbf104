"""Files of text in, documents out: kinds, forms and names; broken files name their line."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import InputError
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import Document, form_of, load_documents, source_name
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer, render_chat
from tests.conftest import tiny_config, write_checkpoint
from tests.unit.text.support import CHAT, write_lines


def test_jsonl_holds_texts_and_chats_with_domains(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "mix.jsonl", {"text": "plain"}, "", {"text": "tagged", "domain": "code"}, {"messages": CHAT}
    )
    assert load_documents(str(path)) == [Document("mix", "plain"), Document("code", "tagged"), Document("mix", CHAT)]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document_of_its_own_domain(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"notes{suffix}"
    path.write_text("eins\nzwei ü\n")
    assert load_documents(str(path)) == [Document("notes", "eins\nzwei ü\n")]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        {},
        {"txt": "a"},
        {"text": 3},
        {"text": None},
        {"text": ["a"]},
        {"messages": 3},
        {"messages": ["hello"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "hello"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": 1, "content": "hello"}]},
        {"messages": [{"role": "developer", "content": "hello"}]},
        {"prompt": [{"role": "moderator", "content": "hello"}], "completion": "hi"},
        {"messages": []},
        {"messages": {}},
        {"messages": [[]]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        {"messages": [{"role": "user", "content": [3]}]},
        {"conversations": [{"from": "narrator", "value": "hello"}]},
        {"conversations": [{"from": "human", "value": None}]},
        {"conversations": []},
        {"instruction": "hello"},
        {"instruction": 3, "output": "hi"},
        {"instruction": "hello", "output": "hi", "history": ["a"]},
        {"prompt": "hello"},
        {"prompt": "hello", "completion": 3},
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": 3}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"role": "assistant", "tool_calls": ["add"]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": "add"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
        {"messages": [{"role": "user", "content": "hello"}], "tools": "no JSON"},
        {"messages": [{"role": "user", "content": "hello"}], "tools": ["add"]},
        {"messages": [{"role": "user", "content": "hello"}], "tools": {"name": "add"}},
        '{"messages": [{"role": "assistant", "tool_calls": [{"name": "\\ud800"}]}]}',
        '{"text": "\\ud800"}',
        "[" * 100_000,
    ],
    ids=lambda line: str(line)[:30],
)
def test_a_broken_line_is_an_error_with_file_and_line(tmp_path: Path, line: Any) -> None:
    path = write_lines(tmp_path / "broken.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(InputError, match=r"broken\.jsonl, line 3: (neither text nor messages|not valid JSON)"):
        load_documents(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.txt", b""), ("a.txt", b" \n\t\n"), ("a.md", b"")],
)
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: no text in it"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_bytes_that_are_no_text_are_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "\xff\xfe"}')
    with pytest.raises(InputError, match=f"{name}: not a text file"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize(
    ("spec", "message"),
    [("absent.jsonl", "cannot be read"), ("text.docx", "unknown kind of text"), ("", "unknown kind of text")],
)
def test_a_text_that_cannot_be_found_is_an_error(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_documents(spec)


@pytest.mark.parametrize("spec", ["bundled", "heldout"])
def test_the_bundled_texts_have_several_domains_and_no_document_in_common(spec: str) -> None:
    documents = load_documents(spec)
    other = load_documents("heldout" if spec == "bundled" else "bundled")
    assert len({document.domain for document in documents}) >= 5
    assert not {str(document.content) for document in documents} & {str(document.content) for document in other}


def test_tools_and_calls_of_a_chat_are_kept(tmp_path: Path) -> None:
    tool, call = {"name": "add", "parameters": {}}, {"function": {"name": "add", "arguments": {"a": 1}}}
    chat = [CHAT[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    path = write_lines(
        tmp_path / "a.jsonl", {"messages": chat, "tools": [tool]}, {"messages": chat, "tools": json.dumps([tool])}
    )
    wanted = [chat[0], {**chat[1], "content": ""}, chat[2]]
    assert load_documents(str(path)) == [Document("a", wanted, [tool])] * 2
    assert render_chat(None, wanted).splitlines()[1] == f"assistant: {json.dumps([call])}"


@pytest.mark.parametrize(
    ("text", "is_chat", "form"),
    [
        ("<think>\nwhy\n</think>", False, "text"),
        ("user: hello", True, "chat"),
        ("<think>\n\n</think>\n\n12", True, "chat"),
        ("<think></think>12", True, "chat"),
        ("<think>\n\n</think>\n<think>why</think>", True, "chat-thinking"),
        ("<think>\n  why\n</think>\n\n12", True, "chat-thinking"),
    ],
)
def test_the_form_of_a_document(text: str, is_chat: bool, form: str) -> None:
    assert form_of(text, is_chat) == form


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("bundled", "bundled"),
        ("self", "self"),
        ("hf:owner/data:train", "hf:owner/data:train"),
        ("/home/me/secret project/own.jsonl", "own.jsonl"),
        ("../own.txt", "own.txt"),
        ("~/own.parquet", "own.parquet"),
    ],
)
def test_a_source_is_called_by_its_keyword_or_its_file_name(spec: str, name: str) -> None:
    assert source_name(spec) == name


def test_the_manifest_says_what_the_calibration_text_was(tmp_path: Path, reference_folder: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", tiny_config(vocab_size=8192))
    for path in reference_folder.glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    lines = [{"text": f"The {i}th line ends here. " * 8, "domain": "lines"} for i in range(9)]
    chats = [{"messages": [*CHAT, {"role": "assistant", "content": f"<think>{i}</think>{i} " * 9}]} for i in range(9)]
    own = write_lines(tmp_path / "own text.jsonl", *lines, *chats)
    recipe = Recipe.from_dict(
        {"name": "test", "method": "gptq", "rules": [{"match": "*", "scheme": {"group_size": 32}}]}, "test"
    )
    quantize(open_checkpoint(source), recipe, tmp_path / "out", QuantizeSettings(str(own), 6, 32, seed=5))
    found = read_manifest(tmp_path / "out")["calibration"]
    assert {key: found[key] for key in ("source", "seed", "samples", "sequence_length", "rows", "tokens")} == {
        "source": "own text.jsonl",
        "seed": 5,
        "samples": 6,
        "sequence_length": 32,
        "rows": 6,
        "tokens": 6 * 32,
    }
    assert found["domains"] == {"lines": 3, "own text": 3}
    assert set(found["documents"]) == {"text", "chat-thinking"}
    assert str(tmp_path) not in (tmp_path / "out" / "qwen3-export.json").read_text()


def test_no_text_needs_a_network(tmp_path: Path, reference_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "a.txt").write_text("plain text " * 40)
    write_lines(tmp_path / "a.jsonl", {"text": "plain text " * 40}, {"messages": CHAT})
    pyarrow.parquet.write_table(pyarrow.table({"text": ["plain text " * 40]}), tmp_path / "a.parquet")
    for spec in ("bundled", "heldout", *(str(path) for path in tmp_path.iterdir())):
        assert calibration_samples(ModelTokenizer(reference_folder), load_documents(spec), 4, 16, 0).ids


@pytest.mark.parametrize(
    "columns", [{"words": ["a"]}, {"text": [3]}, {"messages": [[]]}, {"messages": [[{"role": "user"}]]}], ids=str
)
def test_a_parquet_file_without_text_is_an_error(tmp_path: Path, columns: dict[str, Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 1: neither text nor messages"):
        load_documents(str(tmp_path / "a.parquet"))


def test_bytes_that_are_no_parquet_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"a\.parquet: not a Parquet file"):
        load_documents(str(tmp_path / "a.parquet"))
