"""Chats as calibration text, against transformers with the template that the Qwen3 models are published with.

`qwen3_chat_template.jinja` is that template byte for byte (Apache-2.0, from Qwen3's tokenizer_config.json).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from qwen3_export.text.documents import document_ids, document_text, load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.conftest import copy_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is 7 + 5?"}
AGAIN = {"role": "user", "content": "And 7 × 5 — “exactly”?"}
PLAIN = {"role": "assistant", "content": "12"}
INLINE = {"role": "assistant", "content": "<think>\n7 + 5 = 12\n</think>\n\n12"}
APART = {"role": "assistant", "content": "12", "reasoning_content": "7 + 5 = 12"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 7, "b": 5, "ü": None}}}
BARE = {"name": "add", "arguments": '{"a": 7, "b": 5}'}
RESULT = {"role": "tool", "content": '{"sum": 12}'}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers <exactly>.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CALLING = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, PLAIN]
CHATS: dict[str, dict[str, Any]] = {
    "thought in the content": {"messages": [QUESTION, INLINE]},
    "thought apart": {"messages": [SYSTEM, QUESTION, APART]},
    "no thought": {"messages": [QUESTION, PLAIN]},
    "thought of an earlier turn": {"messages": [QUESTION, INLINE, AGAIN, PLAIN]},
    "thought of the last turn": {"messages": [QUESTION, PLAIN, AGAIN, APART]},
    "only a question": {"messages": [SYSTEM, QUESTION]},
    "tools": {"messages": CALLING, "tools": [TOOL, TOOL]},
    "tools and a system message": {"messages": [SYSTEM, *CALLING], "tools": [TOOL]},
    "tools not named": {"messages": CALLING},
    "bare calls, some text": {
        "messages": [QUESTION, {"role": "assistant", "content": "Let me see.", "tool_calls": [BARE, CALL]}, RESULT]
    },
    "thought before a call": {
        "messages": [QUESTION, {**APART, "content": "", "tool_calls": [CALL]}, RESULT, RESULT, APART],
        "tools": [TOOL],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    """The reference model's tokenizer with the published template."""
    made = tmp_path_factory.mktemp("published")
    copy_tokenizer(reference_folder, made)
    shutil.copyfile(Path(__file__).with_name("qwen3_chat_template.jinja"), made / "chat_template.jinja")
    return made


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_a_line_of_messages_is_the_text_and_the_ids_of_transformers(
    tmp_path: Path, folder: Path, theirs: Any, chat: dict[str, Any]
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat) + "\n")
    (document,) = load_documents(str(path))
    ours, options = ModelTokenizer(folder), {"tools": chat.get("tools")}
    text = document_text(ours, document)
    assert text == theirs.apply_chat_template(chat["messages"], tokenize=False, **options)
    wanted = theirs.apply_chat_template(chat["messages"], tokenize=True, return_dict=True, **options)["input_ids"]
    np.testing.assert_array_equal(document_ids(ours, document), wanted)


@pytest.mark.parametrize(
    ("name", "form", "ending"),
    [
        ("thought in the content", "chat-thinking", "assistant\n<think>\n7 + 5 = 12\n</think>\n\n12<|im_end|>\n"),
        ("thought apart", "chat-thinking", "assistant\n<think>\n7 + 5 = 12\n</think>\n\n12<|im_end|>\n"),
        ("no thought", "chat", "assistant\n<think>\n\n</think>\n\n12<|im_end|>\n"),
        ("thought of an earlier turn", "chat", "assistant\n<think>\n\n</think>\n\n12<|im_end|>\n"),
        ("thought of the last turn", "chat-thinking", "assistant\n<think>\n7 + 5 = 12\n</think>\n\n12<|im_end|>\n"),
    ],
)
def test_thinking_and_non_thinking_answers_are_rendered_as_they_are_generated_and_counted(
    tmp_path: Path, folder: Path, name: str, form: str, ending: str
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(CHATS[name]) + "\n")
    documents = load_documents(str(path))
    assert document_text(ModelTokenizer(folder), documents[0]).endswith(ending)
    assert calibration_samples(ModelTokenizer(folder), documents, 1, 16, 0).documents == {form: 1}


def test_content_that_is_absent_beside_tool_calls_is_empty(tmp_path: Path, folder: Path, theirs: Any) -> None:
    """The published template fails on a null content; data sets have it beside tool calls."""
    path = tmp_path / "chats.jsonl"
    calls = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    path.write_text("".join(json.dumps({"messages": [QUESTION, call, RESULT, PLAIN]}) + "\n" for call in calls))
    wanted = theirs.apply_chat_template(CALLING, tokenize=False)
    assert [document_text(ModelTokenizer(folder), document) for document in load_documents(str(path))] == [wanted] * 2


def test_parquet_holds_the_same_chats(tmp_path: Path, folder: Path) -> None:
    """A column's rows share one struct, so absent keys come back as nulls; tools may stand there as JSON text."""
    import pyarrow
    import pyarrow.parquet

    chosen = [
        {**chat, "tools": json.dumps(chat["tools"]) if "tools" in chat else None}
        for name, chat in CHATS.items()
        if name != "bare calls, some text"
    ]
    plain = {"messages": None, "tools": None}
    rows = [{**plain, **chat, "text": None, "domain": "a"} for chat in chosen] + [{**plain, "text": "t", "domain": "b"}]
    # A null in a call's arguments cannot be told from an absent key in a struct.
    rows = json.loads(json.dumps(rows).replace(', "\\u00fc": null', ""))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    lines = [{key: value for key, value in row.items() if value is not None} for row in rows]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, wanted = (load_documents(str(tmp_path / f"chats.{kind}")) for kind in ("parquet", "jsonl"))
    tokenizer = ModelTokenizer(folder)
    assert [document.domain for document in found] == [document.domain for document in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert document_text(tokenizer, ours) == document_text(tokenizer, theirs)
