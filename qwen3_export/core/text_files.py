"""What is wrong with a folder's tokenizer files, told before they are copied.

no vocabulary       what is written takes no text
a chat template     that fails with a question, as `run` and servers ask one, or that is none
"""

from __future__ import annotations

from pathlib import Path

from qwen3_export.core.confined import ConfinedError, confined
from qwen3_export.core.jinja_template import parse, render, variables_of
from qwen3_export.core.progress import Progress
from qwen3_export.core.tokenizer_files import (
    TOKENIZER,
    chat_templates,
    has_tokenizer,
    special_tokens,
    template_place,
)
from qwen3_export.errors import CheckpointError

_QUESTION = [{"role": "user", "content": "Hello!"}]


def warn_of_text_files(folder: Path, name: str, progress: Progress) -> None:
    """Warn of a folder called `name`, which is written from."""
    if not has_tokenizer(folder):
        progress.warn(
            f"{name} has no {TOKENIZER}: what is written takes no text, in `run`, `validate` or a server, until the "
            "tokenizer files of the original model are copied into it"
        )
    if (warning := template_warning(folder, name)) is not None:
        progress.warn(warning)


def template_warning(folder: Path, name: str) -> str | None:
    """The warning of a chat template that fails; None where all are sound.

    Each runs in a process under limits, which is started where there is one.
    """
    try:
        special = special_tokens(folder)
        for kind, template in chat_templates(folder).items():
            reason = _failure(kind, template, special)
            if reason is not None:
                place = template_place(folder, kind).relative_to(folder)
                called = "" if kind == "default" else f" {kind}"
                return _warning(f"{name}/{place}: the chat template{called} fails ({reason})")
    except CheckpointError as error:
        return _warning(str(error).replace(str(folder), name))
    return None


def _failure(kind: str, template: str, special: dict[str, str]) -> str | None:
    """Why a template fails.

    Only the usual one can be asked a question: others need tools or documents.
    """
    try:
        if kind == "default":
            confined(render)(template, variables_of(_QUESTION, True, True, None, special))
        else:
            confined(parse)(template)
    except ConfinedError as error:
        return str(error)
    return None


def _warning(reason: str) -> str:
    return (
        f"{reason}: `run` and servers will fail with it in what is written. Mend it, take the original model's, or "
        "remove it"
    )
