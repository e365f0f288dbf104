"""Text in, rows of token ids out: seeds, lengths, domains, hashes; broken files name their line."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import CheckpointError, InputError
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import Document, document_ids, form_of, load_documents, source_name
from qwen3_export.text.samples import Samples, calibration_samples, heldout_samples, subsample
from qwen3_export.text.tokenizer import ModelTokenizer, render_chat
from tests.conftest import tiny_config, write_checkpoint


class ByteModel:
    """A tokenizer whose ids are the bytes: what is cut where can be read off."""

    template: str | None = None
    tool_template: str | None = None
    special_tokens: ClassVar[dict[str, str]] = {}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


BYTES: Any = ByteModel()


def numbered(domain: str, count: int, length: int = 10) -> list[Document]:
    """Documents of `length` bytes whose bytes say which document and position they are."""
    return [Document(domain, "".join(chr(33 + (7 * i + j) % 90) for j in range(length))) for i in range(count)]


def test_rows_have_exactly_the_length_asked_for_and_are_pieces_of_the_text() -> None:
    text = "".join(chr(32 + i % 95) for i in range(1000))
    rows = calibration_samples(BYTES, [Document("a", text)], 100, 64, seed=0)
    windows = {text[i : i + 64].encode() for i in range(0, 1000, 64)}
    assert [len(ids) for ids in rows.ids] == [64] * 15
    assert {bytes(ids.tolist()) for ids in rows.ids} == {window for window in windows if len(window) == 64}
    assert all(ids.dtype == np.int32 for ids in rows.ids)
    assert rows.tokens == 15 * 64


def test_documents_are_joined_before_they_are_cut() -> None:
    documents = numbered("a", 20, 10)
    rows = calibration_samples(BYTES, documents, 100, 25, seed=3)
    joined = b"".join(bytes(ids.tolist()) for ids in rows.ids)
    assert len(rows.ids) == 8
    assert Counter(joined) == Counter("".join(str(d.content) for d in documents).encode())


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    documents = numbered("a", 50) + numbered("b", 30)
    first, again, other = (calibration_samples(BYTES, documents, 16, 20, seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256
    assert first.domains == again.domains
    for one, two in zip(first.ids, again.ids, strict=True):
        np.testing.assert_array_equal(one, two)
    assert first.sha256 != other.sha256


def test_rows_are_taken_from_the_domains_in_turn() -> None:
    documents = numbered("a", 100) + numbered("b", 100) + numbered("c", 4)
    rows = calibration_samples(BYTES, documents, 12, 20, seed=0)
    assert Counter(rows.domains) == {"a": 5, "b": 5, "c": 2}
    assert rows.domains[:6] == ("a", "b", "c", "a", "b", "c")


def test_fewer_rows_come_back_when_the_text_is_short() -> None:
    assert len(calibration_samples(BYTES, numbered("a", 5, 10), 100, 20, 0).ids) == 2


@pytest.mark.parametrize("documents", [[], numbered("a", 1, 63), numbered("a", 1, 40) + numbered("b", 1, 40)])
def test_text_without_one_whole_row_is_an_error_that_says_so(documents: list[Document]) -> None:
    with pytest.raises(InputError, match="fewer than 64 tokens in every domain") as caught:
        calibration_samples(BYTES, documents, 8, 64, 0)
    assert caught.value.hint is not None
    assert "--sequence-length" in caught.value.hint


def test_the_hash_is_of_ids_and_row_lengths_and_not_of_domains() -> None:
    ids = np.arange(6, dtype=np.int32)
    digest = hashlib.sha256(
        (4).to_bytes(8, "little") + ids[:4].tobytes() + (2).to_bytes(8, "little") + ids[4:].tobytes()
    )
    assert Samples((ids[:4], ids[4:]), ("a", "b")).sha256 == digest.hexdigest()
    assert Samples((ids[:4], ids[4:]), ("c", "d")).sha256 == digest.hexdigest()
    assert Samples((ids[:2], ids[2:]), ("a", "b")).sha256 != digest.hexdigest()
    assert Samples((ids.astype(np.int64)[:4], ids[4:]), ("a", "b")).sha256 == digest.hexdigest()


def test_held_out_documents_are_cut_in_order_and_short_tails_dropped() -> None:
    documents = [Document("a", "x" * 55), Document("b", "y" * 15), Document("c", "z" * 16)]
    rows = heldout_samples(BYTES, documents, 20)
    assert [(domain, bytes(ids.tolist()).decode()) for domain, ids in zip(rows.domains, rows.ids, strict=True)] == [
        ("a", "x" * 20),
        ("a", "x" * 20),
        ("c", "z" * 16),
    ]


def test_held_out_text_without_a_window_is_an_error() -> None:
    with pytest.raises(InputError, match="no window of 16 tokens"):
        heldout_samples(BYTES, [Document("a", "too short")], 20)


def test_spread_keeps_whole_rows_from_begin_to_end() -> None:
    ids = tuple(np.full(10, i, np.int32) for i in range(10))
    rows = Samples(ids, tuple("abcdefghij"))
    assert subsample(rows, None) is rows
    assert subsample(rows, 100) is rows
    found = subsample(rows, 35)
    assert found.domains == ("a", "e", "j")
    assert [int(row[0]) for row in found.ids] == [0, 4, 9]
    assert len(subsample(rows, 1).ids) == 1


def write_lines(path: Path, *items: Any) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


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


def test_the_documents_that_the_rows_were_cut_from_are_counted() -> None:
    thinking = [{"role": "assistant", "content": "<think>" + "w" * 20 + "</think>"}]
    chats = [Document("chats", thinking)] * 3 + [Document("chats", [{"role": "user", "content": "u" * 40}])] * 2
    documents = [*numbered("texts", 4, 10), *chats]
    everything = calibration_samples(BYTES, documents, 1000, 5, seed=0)
    assert everything.documents == {"chat": 2, "chat-thinking": 3, "text": 4}
    # One row of each domain: 12 bytes of a chat, which may touch two of them, and two texts of 10 bytes.
    few = calibration_samples(BYTES, documents, 2, 12, seed=0)
    assert few.documents["text"] == 2
    assert 1 <= few.documents.get("chat", 0) + few.documents.get("chat-thinking", 0) <= 2


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


def test_a_chat_without_a_template_is_roles_and_contents() -> None:
    assert render_chat(None, CHAT) == "user: hello\nassistant: hi"
    assert render_chat(None, CHAT[:1], generate=True) == "user: hello\nassistant: "


@pytest.mark.parametrize(
    "template", ["{% for", "{{ raise_exception('roles must alternate') }}", "{{ 1 / 0 }}", "{{ a.b }}"]
)
def test_a_template_that_fails_is_an_input_error(template: str) -> None:
    with pytest.raises(InputError, match="the chat template failed"):
        render_chat(template, CHAT)


def test_a_template_cannot_reach_into_python() -> None:
    with pytest.raises(InputError, match="the chat template failed"):
        render_chat("{{ messages.__class__.__mro__[1].__subclasses__() }}", CHAT)


def test_documents_become_ids_by_the_models_tokenizer(reference_folder: Path) -> None:
    tokenizer = ModelTokenizer(reference_folder)
    plain, chat = Document("a", "hello world"), Document("a", CHAT)
    np.testing.assert_array_equal(document_ids(tokenizer, plain), tokenizer.encode("hello world"))
    rendered = render_chat(tokenizer.template, CHAT)
    np.testing.assert_array_equal(document_ids(tokenizer, chat), tokenizer.encode(rendered))
    assert "<|im_start|>user\nhello" in rendered
    assert tokenizer.decode(document_ids(tokenizer, chat), skip_special=False) == rendered


def test_stop_tokens_come_from_every_file_that_names_them(tmp_path: Path, reference_folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((reference_folder / "tokenizer.json").read_bytes())
    assert ModelTokenizer(reference_folder).stop_ids() == {8187, 8185}
    assert ModelTokenizer(tmp_path).stop_ids() == {8185}  # the default of Qwen's tokenizers
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert ModelTokenizer(tmp_path).stop_ids() == {8187}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert ModelTokenizer(tmp_path).stop_ids() == {5, 8187}


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        ModelTokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_tokenizer_configuration_is_refused(tmp_path: Path, reference_folder: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((reference_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        _ = ModelTokenizer(tmp_path).template
