"""Rows and files as people have them: data sets of other shapes, byte-order marks, line ends of Windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.recipe import load_recipe
from qwen3_export.core.resources import resource
from qwen3_export.prove.limits import read_limits
from qwen3_export.text.documents import Document, load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer, chat_text
from tests.conftest import copy_tokenizer, tiny_config, write_checkpoint

USER, ANSWER = {"role": "user", "content": "What is 7 + 5?"}, {"role": "assistant", "content": "12"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "add", "arguments": {"a": 7}}
ROWS: dict[str, tuple[Any, list[dict[str, Any]], str]] = {
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "What is 7 + 5?"}, {"from": "gpt", "value": "12"}]},
        [USER, ANSWER],
        "gpt → assistant, human → user",
    ),
    "ShareGPT with a system text": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "What is 7 + 5?"}]},
        [SYSTEM, USER],
        "human → user",
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "What is 7 + 5?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "12"},
            ]
        },
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "12"}],
        "function_call → assistant, human → user, observation → tool",
    ),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, [USER, ANSWER], ""),
    "Alpaca": (
        {"instruction": "What is", "input": "7 + 5?", "output": "12"},
        [{"role": "user", "content": "What is\n7 + 5?"}, ANSWER],
        "instruction and input → user, output → assistant",
    ),
    "Alpaca without an input, with a system text and a history": (
        {
            "instruction": "And now?",
            "input": "",
            "output": "yes",
            "system": "Be brief.",
            "history": [["What is 7 + 5?", "12"]],
        },
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "yes"}],
        "instruction and input → user, output → assistant",
    ),
    "prompt and completion": (
        {"prompt": "What is 7 + 5?", "completion": "12"},
        [USER, ANSWER],
        "prompt → user, completion → assistant",
    ),
    "prompt and response": (
        {"prompt": "What is 7 + 5?", "response": "12"},
        [USER, ANSWER],
        "prompt → user, response → assistant",
    ),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        [SYSTEM, USER, ANSWER],
        "prompt and completion → one chat",
    ),
    "content as parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What is "}, {"text": "7 + "}, "5?"]},
                ANSWER,
            ]
        },
        [USER, ANSWER],
        "",
    ),
}


# A column of Parquet has one type, so content as mixed parts has no place there.
KINDS = [(name, suffix) for name in ROWS for suffix in (".jsonl", ".json", "lines.json", ".parquet")]
KINDS.remove(("content as parts", ".parquet"))


@pytest.mark.parametrize(("name", "suffix"), KINDS)
def test_a_row_of_another_shape_becomes_a_chat(tmp_path: Path, name: str, suffix: str) -> None:
    row, messages, mapped = ROWS[name]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    elif suffix == ".json":
        path.write_text(json.dumps([row, row], indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, [row, row])))
    assert load_documents(str(path)) == [Document(path.stem, messages, None, mapped)] * 2


def test_what_was_mapped_reaches_the_samples(reference_folder: Path) -> None:
    documents = [Document("a", ROWS[name][1], None, ROWS[name][2]) for name in ("ShareGPT", "Alpaca")] * 40
    samples = calibration_samples(ModelTokenizer(reference_folder), documents, 4, 16, seed=0)
    assert samples.mapped == ("gpt → assistant, human → user", "instruction and input → user, output → assistant")


MARKS = {
    "mark": ("utf-8-sig", "\n"),
    "Windows": ("utf-8-sig", "\r\n"),
    "UTF-16": ("utf-16", "\r\n"),
    "CRLF": ("utf-8", "\r\n"),
}


def _rewrite(path: Path, kind: str) -> None:
    encoding, end = MARKS[kind]
    text = path.read_text(encoding="utf-8").replace("\n", end)
    path.write_bytes(text.encode(encoding))


@pytest.mark.parametrize("kind", list(MARKS))
def test_every_text_of_a_checkpoint_may_come_from_windows(tmp_path: Path, reference_folder: Path, kind: str) -> None:
    folder = copy_tokenizer(reference_folder, write_checkpoint(tmp_path / "model", tiny_config(vocab_size=8192)))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }}\n{% endfor %}\nend\n")
    (folder / "generation_config.json").write_text('{\n"eos_token_id": 7\n}')
    tokenizer = ModelTokenizer(folder)
    wanted = (open_checkpoint(folder).config, chat_text(tokenizer, [USER]), tokenizer.stop_ids())
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        _rewrite(folder / name, kind)
    tokenizer = ModelTokenizer(folder)
    assert (open_checkpoint(folder).config, chat_text(tokenizer, [USER]), tokenizer.stop_ids()) == wanted


@pytest.mark.parametrize("kind", list(MARKS))
def test_recipes_gates_and_texts_may_come_from_windows(tmp_path: Path, kind: str) -> None:
    recipe, gate, text, rows = (tmp_path / name for name in ("mine.yaml", "gate.yaml", "text.txt", "rows.jsonl"))
    recipe.write_bytes((resource("recipes") / "gptq-w4a16-g128.yaml").read_bytes())
    gate.write_text("max_kl: 0.5\nmin_top1: 0.9\n")
    text.write_text("one\ntwo ü\n")
    rows.write_text('{"text": "one ü"}\n{"text": "two"}\n')
    for path in (recipe, gate, text, rows):
        _rewrite(path, kind)
    assert load_recipe(str(recipe)) == load_recipe("gptq-w4a16-g128")
    assert read_limits(gate) == {"max_kl": 0.5, "min_top1": 0.9}
    assert load_documents(str(text)) == [Document("text", "one\ntwo ü\n")]
    assert load_documents(str(rows)) == [Document("rows", "one ü"), Document("rows", "two")]
