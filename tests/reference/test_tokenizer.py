"""Tokens and rendered chats against transformers' tokenizer and template engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from qwen3_export.text.documents import load_documents
from qwen3_export.text.tokenizer import ModelTokenizer, render_chat

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces,\ttabs and\r\nWindows line ends \n\n\n and more   ",
    "naïve café — “quotes” … ½ ™",
    "数据量化:把权重变成四位整数。",
    "混合 text 与 code: x = 3.14159; // コメント 한국어 текст",
    "🙂👩‍👩‍👧‍👦 e\u0301 \u00e9 \u200b\u202e",
    "def f(x):\n    return {'a': [1, 2, 3]}  # comment\n",
    "1234567890 12,345.67 0x7fff 1e-9",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n<tool_call>{}</tool_call><|endoftext|>",
    "<|im_start|><|im_start|><|im_ start|> <think>",
    "I'm you're they've IT'S we'LL",
    "a" * 300,
]
QUESTION = {"role": "user", "content": "What is 7 + 5?"}
ANSWER = {"role": "assistant", "content": "<think>\n7 + 5 = 12\n</think>\n\n12"}
CHATS = {
    "question": [QUESTION],
    "system": [{"role": "system", "content": "Be brief."}, QUESTION],
    "turns": [QUESTION, ANSWER, {"role": "user", "content": "  And {{ 2 }} more?\n"}],
    "ends with an answer": [QUESTION, ANSWER],
    "chinese": [{"role": "user", "content": "你好,<b>&amp; \\n"}],
    "empty": [{"role": "user", "content": ""}],
}
# The constructs of the published Qwen3 template, and what else templates of the family use.
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
EACH = "{% for m in messages %}"
TEMPLATES = {
    "qwen3": QWEN3,
    "json": EACH + "{{ m | tojson }}\n{{ m | tojson(indent=2) }}{% endfor %}",
    "blocks": EACH + "\n    {% if m.role == 'user' %}\n  U: {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "loop controls": EACH + "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "macro": "{% macro say(m) %}[{{ m.role }}] {{ m.content | trim }}{% endmacro %}"
    + EACH
    + "{{ say(m) }}{% endfor %}",
}


@pytest.fixture(scope="module")
def theirs(reference_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(reference_folder)


@pytest.fixture(scope="module")
def ours(reference_folder: Path) -> ModelTokenizer:
    return ModelTokenizer(reference_folder)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:16]))
def test_ids_are_those_of_transformers(theirs: Any, ours: ModelTokenizer, text: str) -> None:
    wanted = theirs(text)["input_ids"]
    np.testing.assert_array_equal(ours.encode(text), wanted)
    assert ours.decode(wanted, skip_special=False) == theirs.decode(wanted)
    assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("spec", ["bundled", "heldout"])
def test_ids_of_the_bundled_texts_are_those_of_transformers(theirs: Any, ours: ModelTokenizer, spec: str) -> None:
    texts = [document.content for document in load_documents(spec) if isinstance(document.content, str)][::8]
    assert len(texts) >= 3
    for text in texts:
        np.testing.assert_array_equal(ours.encode(text), theirs(text)["input_ids"])


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_the_models_template_renders_as_in_transformers(
    theirs: Any, ours: ModelTokenizer, chat: list[dict[str, Any]], generate: bool, thinking: bool
) -> None:
    options = {"add_generation_prompt": generate, "enable_thinking": thinking}
    found = render_chat(ours.template, chat, generate=generate, thinking=thinking)
    assert found == theirs.apply_chat_template(chat, tokenize=False, **options)
    ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=True, **options)["input_ids"]
    np.testing.assert_array_equal(ours.encode(found), ids)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_other_templates_render_as_in_transformers(
    theirs: Any, template: str, chat: list[dict[str, Any]], generate: bool, thinking: bool
) -> None:
    wanted = theirs.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=generate, enable_thinking=thinking
    )
    assert render_chat(template, chat, generate=generate, thinking=thinking) == wanted
