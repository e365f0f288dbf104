"""Compares chat template, stop tokens and sampling settings with the original's.

    chat template       some chats, rendered with and without thinking, compared as text
    generation config   stop tokens and sampling settings, compared by value

A GGUF file has both in its header; only the settings that llama.cpp knows are compared there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import read_sidecar
from qwen3_export.errors import ExportError
from qwen3_export.run.artifact import tokenizer_of
from qwen3_export.run.session import HasMetadata, Session
from qwen3_export.text.chat_template import render_chat
from qwen3_export.text.tokenizer import ModelTokenizer, TextModel

_USER = {"role": "user", "content": "What is 2 + 2?"}
_CHATS: tuple[list[dict[str, Any]], ...] = (
    [_USER],
    [{"role": "system", "content": "Answer briefly."}, _USER],
    [
        _USER,
        {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ],
)
# Not settings: the version of the library that wrote the file.
_NOT_SETTINGS = ("transformers_version", "_from_model_config")
_GGUF_SETTINGS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True)
class Sidecars:
    """An original's chat template, generation config and stop tokens."""

    chat_template: str | None
    generation_config: dict[str, Any]
    stop_ids: tuple[int, ...]

    def to_json(self) -> str:
        """As text, for the header of a reference file."""
        return json.dumps(asdict(self), ensure_ascii=False)


def read_sidecars(folder: Path) -> Sidecars:
    """The sidecars of a checkpoint folder; CheckpointError when one is broken."""
    tokenizer = ModelTokenizer(folder)
    config = read_sidecar(folder / "generation_config.json")
    return Sidecars(tokenizer.template, _settings(config), tuple(sorted(tokenizer.stop_ids())))


def parse_sidecars(text: str | None) -> Sidecars | None:
    """The sidecars in a reference file's header; None in files without them."""
    if text is None:
        return None
    values = json.loads(text)
    return Sidecars(values["chat_template"], dict(values["generation_config"]), tuple(values["stop_ids"]))


def compare_sidecars(artifact: Path, session: Session, original: Sidecars | None) -> dict[str, Any]:
    """Compare an artifact's sidecars: `{chat_template, generation_config, changed}`.

    The first two are `same`, `differs`, `missing` or `unknown`; `changed` counts those that are not the same, and is
    None where the reference does not hold the original's sidecars.
    """
    if original is None:
        return {"chat_template": "unknown", "generation_config": "unknown", "changed": None}
    try:
        tokenizer: TextModel | None = tokenizer_of(artifact, session)
    except ExportError:
        tokenizer = None
    template = _compare_templates(original.chat_template, tokenizer.template if tokenizer else None)
    if isinstance(session, HasMetadata):
        stops = tokenizer.stop_ids() if tokenizer else set()
        config = _compare_header(original, session, stops)
    else:
        config = _compare_configs(original, artifact)
    return {
        "chat_template": template,
        "generation_config": config,
        "changed": sum(state != "same" for state in (template, config)),
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_SETTINGS}


def _compare_templates(original: str | None, found: str | None) -> str:
    if original == found:
        return "same"
    if original is None or found is None:
        return "missing" if found is None else "differs"
    return "same" if _rendered(original) == _rendered(found) else "differs"


def _rendered(template: str) -> list[str]:
    """Some chats rendered in every mode, or the error of a template that fails."""
    texts = []
    for chat in _CHATS:
        for thinking in (True, False):
            try:
                texts.append(render_chat(template, chat, generate=True, thinking=thinking))
            except ExportError as error:
                texts.append(f"error: {error}")
    return texts


def _compare_configs(original: Sidecars, artifact: Path) -> str:
    path = artifact / "generation_config.json"
    if not path.is_file():
        return "missing" if original.generation_config else "same"
    return "same" if _settings(read_sidecar(path)) == original.generation_config else "differs"


def _compare_header(original: Sidecars, session: HasMetadata, stops: set[int]) -> str:
    """Compare a GGUF header's stop tokens and sampling settings with the original's.

    The runtime must stop at all of the original's stop tokens.
    """
    wanted = {
        key: original.generation_config[name]
        for name, key in _GGUF_SETTINGS.items()
        if original.generation_config.get(name) is not None
    }
    found = {key: session.metadata(f"general.sampling.{key}") for key in wanted}
    if wanted and all(value is None for value in found.values()):
        return "missing"
    same = all(value is not None and abs(float(value) - float(wanted[key])) < 1e-6 for key, value in found.items())
    return "same" if same and set(original.stop_ids) <= stops else "differs"
