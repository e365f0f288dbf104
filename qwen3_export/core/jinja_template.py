"""Chat templates of other people: what they get, and what comes of it.

variables    messages, tools, documents, add_generation_prompt, the special tokens by role, enable_thinking
functions    raise_exception, strftime_now, dict, namespace, tojson with its four options
syntax       loop controls and the `generation` tag, which marks an answer and renders as its content

They run in a process under limits (`core.confined`), which alone imports jinja2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

# A rendered chat is little longer than its messages and template; far longer ones are refused.
_MOST_ADDED, _MOST_TIMES = 1 << 20, 16


def variables_of(
    messages: list[dict[str, Any]],
    generate: bool,
    thinking: bool,
    tools: list[dict[str, Any]] | None,
    special_tokens: Mapping[str, str],
) -> dict[str, Any]:
    """What a template gets, as transformers gives it."""
    return {
        **special_tokens,
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": generate,
        "enable_thinking": thinking,
    }


def parse(template: str) -> None:
    """Raise jinja2's error for a template that is none, in this process."""
    _compiled(template)


def render(template: str, variables: dict[str, Any]) -> str:
    """Render in this process, without limits of time.

    Raises ValueError when the text is far longer than the variables.
    """
    most = _MOST_ADDED + _MOST_TIMES * (len(template) + len(json.dumps(variables)))
    parts, length = [], 0
    for part in _compiled(template).generate(variables):
        length += len(part)
        if length > most:
            raise ValueError(f"it makes a text of more than {most} characters")
        parts.append(part)
    text = "".join(parts)
    text.encode()
    return text


@lru_cache(8)
def _compiled(template: str) -> jinja2.Template:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """The tag around an assistant's answer."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return str(caller())

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=_strftime, dict=_Dict())
    environment.globals["namespace"] = _namespace_class(jinja2)
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime(form: str) -> str:
    """The present time, or `SOURCE_DATE_EPOCH`, with which a calibration can be repeated another day."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    return (datetime.fromtimestamp(int(fixed), UTC) if fixed else datetime.now()).strftime(form)


def _raise(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


class _Dict:
    """`dict` for templates, without the rest of the type."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(keys, value)


def _namespace_class(jinja2: Any) -> type:
    """jinja2's namespace without names that begin with an underscore, as transformers refuses them."""

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc]
        def __init__(*items: Any, **named: Any) -> None:
            values = dict(*items[1:], **named)
            for name in values:
                _refuse(name)
            jinja2.utils.Namespace.__init__(items[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _refuse(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}: it begins with _")

    return Namespace
