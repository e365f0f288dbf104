"""What the server's code makes of a request, before any model sees it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen3_export.errors import InputError
from qwen3_export.text.chat_template import render_chat
from tests.cli.helpers import call

USER = {"role": "user", "content": "hi"}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The backend's module, with Triton's own replaced by what the requests here need."""
    inputs = SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, get_input_tensor_by_name=lambda request, name: request.get(name)
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", inputs)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "qwen3_export.ship.triton.model"
    yield importlib.import_module(name)
    sys.modules.pop(name)


def asked(**values: Any) -> dict[str, Any]:
    """A request; what is no text is sent as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return {
        key: SimpleNamespace(as_numpy=lambda text=text: np.array([text.encode()], object))
        for key, text in texts.items()
    }


# Messages, and the refusal's words.
REFUSED: list[tuple[Any, str]] = [
    ([USER, {"role": "robot", "content": "x"}], "messages[1].role: 'robot' is unknown; known are system, user, "),
    ([{"role": "", "content": "x"}], "messages[0].role: '' is unknown"),
    ([{"role": 3, "content": "x"}], "messages[0].role: text was expected, found a number"),
    ([{"content": "x"}], "messages[0].role: text was expected, found nothing"),
    ([{"role": "user", "content": None}], "messages[0].content: text was expected, found nothing"),
    ([{"role": "user"}], "messages[0].content: text was expected, found nothing"),
    ([USER, {"role": "user", "content": 7}], "messages[1].content: text was expected, found a number"),
    ([{"role": "user", "content": {"a": 1}}], "messages[0].content: text was expected, found an object"),
    ([{"role": "user", "content": [3]}], "messages[0].content[0]: text was expected, found a number"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "b"}]}],
        "messages[0].content[1]: text was expected, found 'image_url'",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text: text was expected"),
    ([{"role": "assistant", "content": "a", "reasoning_content": 3}], "messages[0].reasoning_content: text was "),
    ([{"role": "assistant", "tool_calls": [3]}], "messages[0]: a tool call needs a function with a name"),
    ([{"role": "user", "content": "\ud800"}], "messages[0]: half of a surrogate pair"),
    (["hi"], "messages[0]: an object was expected, found a text"),
    ([], "messages: a list of"),
]


@pytest.mark.parametrize(("messages", "words"), REFUSED, ids=lambda value: str(value)[:40].encode("ascii", "replace"))
def test_messages_that_the_template_would_drop_or_break_on(model: ModuleType, messages: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        model._read(asked(messages=messages))
    assert str(caught.value).startswith(words)


def test_parts_of_text_are_one_text(model: ModuleType) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the sea?"}]
    system, call = {"role": "system", "content": "Be brief."}, {"function": {"name": "f", "arguments": {}}}
    chat = [system, {"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call]}]
    found = model._read(asked(messages=chat))["messages"]
    assert [message["content"] for message in found] == ["Be brief.", "What is the sea?", ""]
    assert render_chat("{{ messages[1].content }}", found) == "What is the sea?"
    assert model._read(asked(text_input="hi"))["messages"] == [USER]


# Options of `run` and of a request, and numbers at their limits and just beyond.
LIMITS = [
    ("--max-new-tokens", "max_tokens", (1, 1 << 20), (0, (1 << 20) + 1)),
    ("--temperature", "temperature", (0, 1000), (-0.001, 1000.5)),
    ("--top-p", "top_p", (0, 0.005, 1), (-0.001, 1.001)),
    ("--seed", "seed", (0, (1 << 63) - 1), (-1, 1 << 63)),
]


@pytest.mark.parametrize(("option", "key", "taken", "refused"), LIMITS, ids=[item[1] for item in LIMITS])
def test_requests_take_the_numbers_that_run_takes(
    model: ModuleType, option: str, key: str, taken: tuple[float, ...], refused: tuple[float, ...]
) -> None:
    for number in taken:
        found = model._read(asked(text_input="hi", sampling_parameters={key: number}))["sampling"]
        assert getattr(found, {"max_tokens": "max_new_tokens"}.get(key, key)) == number
        assert "nowhere: no such folder" in call("run", "nowhere", "--prompt", "hi", option, number).err
    for number in refused:
        with pytest.raises(InputError, match=f"sampling_parameters: {key} is "):
            model._read(asked(text_input="hi", sampling_parameters={key: number}))
        assert f"Invalid value for '{option}'" in call("run", "nowhere", "--prompt", "hi", option, number).err


@pytest.mark.parametrize("value", [True, "1", None, [1], float("nan")])
@pytest.mark.parametrize("key", ["max_tokens", "temperature", "top_p", "seed"])
def test_sampling_takes_numbers_alone(model: ModuleType, key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        model._read(asked(text_input="hi", sampling_parameters={key: value}))
