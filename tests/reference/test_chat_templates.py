"""Chat templates as fine-tuned models have them, against transformers' own rendering, and special and stop tokens."""

# ruff: noqa: E501 (a template is easier to read on one line)

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen3_export.core.confined import confined
from qwen3_export.core.tokenizer_files import id_lookup, stop_ids
from qwen3_export.errors import CheckpointError, ExportError
from qwen3_export.text.tokenizer import ModelTokenizer, chat_text
from tests.conftest import copy_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & „kind“."},
    {"role": "user", "content": " What is 7 + 5? "},
    {"role": "assistant", "content": "12", "reasoning_content": "7 + 5 = 12", "tool_calls": None},
    {"role": "user", "content": "And 深海?"},
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds <two>.", "parameters": {"b": 1, "a": 2}}}
]
# Every construct that templates of published and fine-tuned models use, one or two in each.
TEMPLATES = {
    "bos": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "eos and pad": "{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token }}|{{ cls_token }}|{{ no_such_token }}|",
    "undefined in a test": "{% if bos_token is defined %}has{% else %}has not{% endif %}{{ 'x' if mask_token else 'y' }}",
    "default": "{{ (bos_token | default('none')) ~ (system_message | default(messages[0].content, true)) }}",
    "date": "{{ strftime_now('%Y') | length }}{% if strftime_now is defined %} dated{% endif %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{%- endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 0 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(sort_keys=true) }}"
    "{{ messages | tojson(ensure_ascii=True) }}{{ tools | tojson(separators=(',', ':')) }}",
    "tools": "{% if tools %}{% for t in tools %}{{ t.function.name }}: {{ t.function.parameters | tojson }}{% endfor %}"
    "{% else %}no tools{% endif %}",
    "namespace": "{% set ns = namespace(found=false, last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ dict.fromkeys(['x', 'y'], 3) | tojson }}",
    "macro": "{% macro turn(m) -%}<{{ m.role }}>{{ caller() }}</{{ m.role }}>{%- endmacro %}"
    "{% for m in messages %}{% call turn(m) %}{{ m.content }}{% endcall %}{% endfor %}",
    "thoughts": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning is defined }};{% endfor %}",
    "absent keys": "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.tool_calls is defined }}{% endfor %}",
    "prompt": "{{ messages | length }}{% if add_generation_prompt %}<go>{% endif %}{{ documents is none }}",
    "thinking": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}.",
    "white space": "  {% if true %}\n    a\n  {% endif %}\n{# a comment #}\n  b  \n",
    "strings": "{{ messages[1].content.strip().split(' ')[0] }}{{ 'a-b' | replace('-', '+') }}{{ 'x'.startswith('x') }}"
    "{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "lines": "{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}",
}


def _folder(path: Path, reference: Path, template: str | None = None, **config: Any) -> Path:
    """The reference model's tokenizer with another template and other settings."""
    path.mkdir()
    copy_tokenizer(reference, path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template, newline="")
    file = path / "tokenizer_config.json"
    values = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "remove"}))
    shutil.copyfile(reference / "config.json", path / "config.json")
    return path


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_template_renders_as_in_transformers(tmp_path: Path, reference_folder: Path, name: str) -> None:
    bos = {"bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "special": True}} if "bos" in name else {}
    folder = _folder(tmp_path / "model", reference_folder, TEMPLATES[name], **bos)
    theirs, ours = AutoTokenizer.from_pretrained(folder), ModelTokenizer(folder)
    for generate in (False, True):
        for tools in (None, TOOLS):
            for thinking in (True, False):
                options: dict[str, Any] = {"tools": tools, "add_generation_prompt": generate}
                wanted = theirs.apply_chat_template(CHAT, tokenize=False, enable_thinking=thinking, **options)
                assert chat_text(ours, CHAT, generate, thinking, tools) == wanted


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.attribute }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "_x"),
        ("{% for m in messages %}", "end of template"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_in_transformers_is_refused_with_its_reason(
    tmp_path: Path, reference_folder: Path, template: str, reason: str
) -> None:
    folder = _folder(tmp_path / "model", reference_folder, template)
    with pytest.raises(Exception, match=reason):
        AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)
    with pytest.raises(ExportError, match=f"the chat template failed.*{reason}"):
        chat_text(ModelTokenizer(folder), CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% for a in range(90000) %}{% for b in range(9000) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
        "{{ '%999999999999d' % 1 }}",
        "{{ 2 ** (10 ** 10) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_a_template_that_would_not_end_or_fills_the_memory_is_refused(
    tmp_path: Path, reference_folder: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3_export.core.confined.SECONDS", 1.0)
    confined.cache_clear()
    ours = ModelTokenizer(_folder(tmp_path / "model", reference_folder, template))
    with pytest.raises(ExportError, match="the chat template failed"):
        chat_text(ours, CHAT)
    # And the next one works.
    again = _folder(tmp_path / "next", reference_folder, "{{ messages[0].role }}")
    assert chat_text(ModelTokenizer(again), CHAT) == "system"
    confined.cache_clear()


def test_templates_by_name_are_chosen_as_transformers_chooses(tmp_path: Path, reference_folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    folder = _folder(tmp_path / "model", reference_folder, None, chat_template=named)
    theirs, ours = AutoTokenizer.from_pretrained(folder), ModelTokenizer(folder)
    for tools in (None, TOOLS):
        assert chat_text(ours, CHAT, tools=tools) == theirs.apply_chat_template(CHAT, tokenize=False, tools=tools)


ADDED = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"eos_token": "<|im_end|>"},
        {"eos_token": ADDED, "bos_token": ADDED},
        {"eos_token": None},
        {"eos_token": "remove", "pad_token": "remove", "unk_token": "remove"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "remove", "pad_token": "remove"},
        {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "remove", "pad_token": "remove"},
        {"tokenizer_class": "remove", "eos_token": "remove"},
        {"added_tokens_decoder": "remove", "eos_token": "<|im_end|>"},
    ],
)
@pytest.mark.parametrize("special_map", [False, True])
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path, reference_folder: Path, config: dict[str, Any], special_map: bool
) -> None:
    folder = _folder(tmp_path / "model", reference_folder, "x", **config)
    if special_map:
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": ADDED, "pad_token": "<|endoftext|>"}))
    assert ModelTokenizer(folder).special_tokens == AutoTokenizer.from_pretrained(folder).special_tokens_map


@pytest.mark.parametrize(
    ("generation", "config", "eos", "wanted"),
    [
        ([8187, 8185], None, "<|im_end|>", {8187, 8185}),
        (8185, None, "<|endoftext|>", {8185}),
        (8185, 8187, None, {8185, 8187}),
        (None, 8187, None, {8187}),
        (None, [8187, 8185], "<|im_end|>", {8187, 8185}),
        (None, None, "<|im_end|>", {8187}),
        (None, None, ADDED, {8187}),
        (8185, None, ADDED, {8185, 8187}),
        (None, None, "remove", {8185}),
        (None, None, "<|no such token|>", set()),
    ],
)
def test_stop_tokens_come_from_all_three_files(
    tmp_path: Path, reference_folder: Path, generation: Any, config: Any, eos: Any, wanted: set[int]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference_folder)
    named = {
        8187: tokenizer.convert_tokens_to_ids("<|im_end|>"),
        8185: tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }

    def real(value: Any) -> Any:
        return [named[i] for i in value] if isinstance(value, list) else named.get(value)

    folder = _folder(tmp_path / "model", reference_folder, "x", eos_token=eos)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**values, "eos_token_id": real(value)}))
    assert ModelTokenizer(folder).stop_ids() == {named[i] for i in wanted}
    assert set(stop_ids(folder, id_lookup(folder))) == {named[i] for i in wanted}


@pytest.mark.parametrize("value", ["151645", 1.5, [True], [[1]], -1, {}])
def test_a_stop_token_that_is_no_id_is_refused(tmp_path: Path, reference_folder: Path, value: Any) -> None:
    folder = _folder(tmp_path / "model", reference_folder, "x")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is"):
        ModelTokenizer(folder).stop_ids()


def test_a_folder_with_vocab_and_merges_alone_is_read_as_transformers_reads_it(
    tmp_path: Path, reference_folder: Path
) -> None:
    whole = _folder(tmp_path / "whole", reference_folder, "x")
    model = json.loads((whole / "tokenizer.json").read_text())["model"]
    folder = _folder(tmp_path / "split", reference_folder, "x", tokenizer_class="Qwen2Tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours, theirs = ModelTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "Don't stop, we've 1234 things;  two  spaces\n\n深海 <|im_start|>user\nÅngström é<|im_end|> ... __init__()"
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text).tolist() == ModelTokenizer(whole).encode(text).tolist()
    assert ours.decode(ours.encode(text).tolist(), skip_special=False) == text
