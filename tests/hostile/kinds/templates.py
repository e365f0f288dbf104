"""Chat templates that loop, multiply, recurse, attack the interpreter, or are no text."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tests.hostile.damage import TEXTS, in_words, odd, replace_file
from tests.hostile.trial import Place, Trial

_BODIES = (
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 'x' * 10**13 }}",
    "{{ 2 ** (10 ** 9) }}",
    "{% set ns = namespace(s='x') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ self.__init__ }}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}{{ os.system('touch stolen') }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(1, 2) }}",
    "{{ strftime_now('%' * 1000) }}",
    "{{ strftime_now(3) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ ('a' * 1000000) | urlize }}",
    "{{ 'a' | center(10**10) }}",
    "{{ '{:>9999999999}'.format('x') }}",
    "{{ '%0999999999d' % 5 }}",
    "{{ range(10**18) | list }}",
    "{{ undefined_name.attribute }}",
    "{{ 1 // 0 }}",
    "{% for m in messages %}",
    "{% generation %}",
    "{{ '\\ud800' }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{% if true %}" * 500 + "{% endif %}" * 500,
    "{{ lipsum(n=100000) }}",
    "{{ cycler }}{{ joiner }}{{ namespace(__class__=1) }}",
    "{{ dict.fromkeys(range(99999), 'x' * 99999) | tojson }}",
)


def make(random: Random, place: Place) -> Trial:
    """A folder with a hostile template, and a command that renders chats with it."""
    folder = place.copy(random.choice(("model", "onnx")))
    body = random.choice(_BODIES)
    what = _put(random, folder, body)
    if folder.name == "onnx" or random.random() < 0.6:
        return Trial(what, ("run", folder, "--prompt", "Hello, ocean.", "--max-new-tokens", "2"))
    rows = place.folder / "chats.jsonl"
    chat = [{"role": "user", "content": "waves " * 40}, {"role": "assistant", "content": "shore " * 40}]
    rows.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(3)))
    options = ("--calibration", rows, "--samples", "2", "--sequence-length", "16", "--output", place.out)
    return Trial(what, ("quantize", folder, "--recipe", "gptq-w4a16-g32", *options), outputs=(place.out,))


def _put(random: Random, folder: Path, body: str) -> str:
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    roll = random.random()
    if roll < 0.6:
        path.write_bytes(body.encode("utf-8", "surrogatepass"))
        return f"template {body[:40]!r}"
    if roll < 0.7:
        name = random.choice(list(TEXTS))
        path.write_bytes(TEXTS[name])
        return f"template is {name}"
    if roll < 0.8:
        path.touch()
        return f"template: {replace_file(random, path)}"
    value = random.choice(
        (body, [{"name": "default", "template": body}], [{"name": "tool_use", "template": body}], odd(random))
    )
    values = {**json.loads(config.read_text()), "chat_template": value}
    try:
        config.write_text(json.dumps(values))
    except (ValueError, RecursionError):
        config.write_text(json.dumps({**values, "chat_template": 3}))
    return f"chat_template {in_words(value)}"
