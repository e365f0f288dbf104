"""Stop tokens in every artifact: what generation_config.json, config.json and the tokenizer name ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.errors import UnsupportedError
from qwen3_export.run.artifact import open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx
from tests.cli.helpers import write_text_model

END, PIECE = 8187, 8185


def _model(path: Path, generation: Any, config: Any, eos: Any) -> Path:
    folder = write_text_model(path, num_attention_heads=2, num_key_value_heads=1, head_dim=64, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": eos}))
    return folder


# 300 and 301 are ordinary tokens, as a fine-tuned model may end its answers with.
@pytest.mark.parametrize(
    ("generation", "config", "eos", "wanted"),
    [
        ([END, PIECE], None, "<|im_end|>", {END, PIECE}),
        (None, 300, None, {300}),
        ([300, 301], END, {"__type": "AddedToken", "content": "<|im_end|>"}, {300, 301, END}),
        (301, None, "<|endoftext|>", {301, PIECE}),
    ],
)
def test_every_artifact_ends_an_answer_at_the_same_tokens(
    tmp_path: Path, generation: Any, config: Any, eos: Any, wanted: set[int]
) -> None:
    source = open_checkpoint(_model(tmp_path / "model", generation, config, eos))
    export_onnx(source, tmp_path / "onnx")
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]["eos_token_id"]
    assert set(genai if isinstance(genai, list) else [genai]) == wanted
    export_gguf(source, tmp_path / "model.gguf")
    for artifact in (source.folder, tmp_path / "onnx", tmp_path / "model.gguf"):
        session = open_session(artifact, RuntimeOptions(threads=1))
        found = tokenizer_of(artifact, session).stop_ids()
        # llama.cpp knows some tokens by their text, and ends answers there too.
        assert wanted <= found <= wanted | {END, PIECE, 8184, 8186} if artifact.suffix == ".gguf" else found == wanted
        session.close()


def test_more_stop_tokens_than_gguf_has_places_for_are_refused_by_name(tmp_path: Path) -> None:
    source = open_checkpoint(_model(tmp_path / "model", [300, 301, 302], None, "<|im_end|>"))
    with pytest.raises(UnsupportedError, match="no place for so many tokens that end an answer"):
        export_gguf(source, tmp_path / "model.gguf")


def test_a_template_gets_the_same_special_tokens_from_a_gguf_file(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", END, None, "<|im_end|>")
    export_gguf(open_checkpoint(folder), tmp_path / "model.gguf")
    session = open_session(tmp_path / "model.gguf", RuntimeOptions(threads=1))
    assert tokenizer_of(tmp_path / "model.gguf", session).special_tokens["eos_token"] == "<|im_end|>"
    assert "bos_token" not in tokenizer_of(tmp_path / "model.gguf", session).special_tokens
    session.close()
