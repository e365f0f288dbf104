"""JSON and YAML in which no mapping has a key twice.

Parsers keep the last value of such a key, so what its author wrote first would be lost in silence.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml


class DuplicateKeyError(ValueError):
    """A mapping in which a key stands twice."""


def loads_json(text: str) -> Any:
    """The value of a JSON text; raises DuplicateKeyError."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKeyError(f"the key {twice!r} is given twice")
    return values


def loads_yaml(text: str) -> Any:
    """The value of a YAML text, plain types alone.

    Raises DuplicateKeyError, which names the lines.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_nodes(loader, root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _check_nodes(loader: yaml.SafeLoader, root: yaml.Node) -> None:
    """Look at each node once, however often it is an alias."""
    import yaml

    seen, waiting = set[int](), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_mapping(loader, node)
            waiting += [item for pair in node.value for item in pair]
        else:
            waiting += node.value


def _check_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> None:
    import yaml

    lines: dict[Any, int] = {}
    for key, _ in node.value:
        # A merge (`<<`) may be repeated, and its keys may be replaced.
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        name, line = loader.construct_object(key), key.start_mark.line + 1
        if name in lines:
            raise DuplicateKeyError(f"the key {key.value!r} is given twice, in lines {lines[name]} and {line}")
        lines[name] = line
