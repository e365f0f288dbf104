"""Text and chats in, token ids out, by the model's own tokenizer and template; broken ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen3_export.errors import CheckpointError, InputError
from qwen3_export.text.documents import Document, document_ids
from qwen3_export.text.tokenizer import ModelTokenizer, render_chat
from tests.unit.text.support import CHAT


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
