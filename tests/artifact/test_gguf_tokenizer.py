"""The tokenizer inside a GGUF file, as llama.cpp runs it, against tokenizer.json in the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.run.artifact import open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.text.documents import load_documents
from qwen3_export.text.tokenizer import ModelTokenizer, TextModel, render_chat
from tests.artifact.support import with_tokenizer
from tests.conftest import tiny_config, write_checkpoint

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs; isn't it?",
    "I'm you'LL they'Ve  two  spaces\t\ttabs \r\n\r\nand lines\n\n\n",
    "你好，世界！今天天气很好。混合 English 和中文 text 123456 7.89",
    "def f(x: int) -> int:\n    return x**2  # 注释\n\n\nclass A:\n\tpass\n",
    "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>",
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|endoftext|>',
    "<|im_start|> and <think without its end, <|no_such_token|>, [PAD8192]",
    "ÀÉñ é ﬁ Å ½ ² Ⅷ ٣٤٥",
    "👩‍👩‍👧‍👦 🇩🇪 ☃️",
    "العربية עברית हिन्दी ไทย 한국어 日本語",
    "   leading and trailing   ",
    " " * 100 + "\n" * 50 + "x" * 300,
    "",
]


@pytest.fixture(scope="module")
def llama(gguf_file: Callable) -> Iterator[TextModel]:
    artifact = gguf_file("original", "bf16").path
    session = open_session(artifact, RuntimeOptions(threads=1, context=64))
    yield tokenizer_of(artifact, session)
    session.close()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text(llama: TextModel, tokenizer: ModelTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    np.testing.assert_array_equal(llama.encode(text), ids)
    assert llama.decode(ids, skip_special=False) == tokenizer.decode(ids, skip_special=False) == text


def test_bundled_text(llama: TextModel, tokenizer: ModelTokenizer) -> None:
    """Every held-out document: English, Chinese, code, mathematics, structured text and rendered chats."""
    count = 0
    for document in load_documents("heldout"):
        content = document.content
        text = content if isinstance(content, str) else render_chat(tokenizer.template, content)
        ids = tokenizer.encode(text)
        np.testing.assert_array_equal(llama.encode(text), ids)
        assert llama.decode(ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)
        count += len(ids)
    assert count > 10_000


def test_every_token_has_the_same_text(llama: TextModel, tokenizer: ModelTokenizer) -> None:
    wrong = [i for i in range(8192) if llama.decode([i], False) != tokenizer.decode([i], False)]
    assert wrong == []


def test_special_tokens_are_left_out_of_text(llama: TextModel, tokenizer: ModelTokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|endoftext|>")
    assert llama.decode(ids) == tokenizer.decode(ids) == "user\nHi\n"


def test_template_and_stop_tokens(llama: TextModel, tokenizer: ModelTokenizer) -> None:
    assert llama.template == tokenizer.template
    assert llama.template
    assert llama.stop_ids() == tokenizer.stop_ids() == {8185, 8187}


def test_padded_vocabulary_changes_no_token(tmp_path: Path, reference_folder: Path, tokenizer: ModelTokenizer) -> None:
    folder = with_tokenizer(write_checkpoint(tmp_path / "tiny", tiny_config(vocab_size=8256)), reference_folder)
    export_gguf(open_checkpoint(folder), tmp_path / "out.gguf")
    session = open_session(tmp_path / "out.gguf", RuntimeOptions(threads=1))
    assert session.vocab_size == 8256
    for text in TEXTS:
        found = tokenizer_of(tmp_path / "out.gguf", session).encode(text)
        np.testing.assert_array_equal(found, tokenizer.encode(text))
    session.close()


def test_vocab_and_merges_alone_give_the_tokenizer_of_tokenizer_json(tmp_path: Path, reference_folder: Path) -> None:
    """An older folder without tokenizer.json: the same keys and bytes in the file's header."""
    files = []
    for name in ("whole", "split"):
        folder = with_tokenizer(
            write_checkpoint(tmp_path / name / "model", tiny_config(vocab_size=8192)), reference_folder
        )
        if name == "split":
            model = json.loads((folder / "tokenizer.json").read_text())["model"]
            (folder / "tokenizer.json").unlink()
            (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        export_gguf(open_checkpoint(folder), tmp_path / f"{name}.gguf")
        files.append(GGUFReader(tmp_path / f"{name}.gguf").fields)
    whole, split = files
    assert whole.keys() == split.keys()
    for key in whole:
        assert [part.tobytes() for part in whole[key].parts] == [part.tobytes() for part in split[key].parts], key
