"""Recipes and gate files: YAML with odd values, tags, anchors, nests and bytes."""

from __future__ import annotations

from random import Random
from typing import Any

import yaml

from qwen3_export.core.recipe import load_recipe, recipe_names
from tests.hostile.damage import change_json
from tests.hostile.trial import REFUSED, Place, Trial

_TEXTS: tuple[bytes, ...] = (
    b"",
    b"null",
    b"3",
    b"[]",
    b"- a",
    b"a: *b",
    b"!!python/object:os.system {}",
    b"!foo bar",
    b"&a [*a]",
    b"a: &a {b: *a}",
    b"{",
    b"[" * 5000,
    b"{a: " * 3000,
    b"\xff\xfe",
    b"a: 2026-13-45",
    b"2026-01-01: x",
    b"? [a, b]\n: c",
    b"<<: 3",
    b"a: 1\na: 2",
    b"a: !!binary x",
    b"a: !!float x",
    b"a: !!int x",
    b"a: !!timestamp x",
    b"\tkey: x",
    b"%YAML 9.9\n---\na: 1",
    b"a: 0x" + b"f" * 5000,
    b"max_kl: " + b"9" * 400,
    b"max_kl: 1e999",
    b"max_kl: .nan",
    b"max_kl: 190:20:30",
    b"--- a\n--- b",
    b"a: [" + b"&x [lol, lol], " * 50 + b"]",
    "a: \u0000".encode(),
    b"a: '\\ud800'",
    b'a: "\\ud800"',
    b"max_kl: !!set {a}",
)


def make(random: Random, place: Place) -> Trial:
    """A file for --recipe, --gate or `recipes show`."""
    path = place.folder / "given.yaml"
    if random.random() < 0.3:
        text = random.choice(_TEXTS)
        path.write_bytes(text)
        what, codes = f"{text[:30]!r}", REFUSED
    else:
        recipe: Any = load_recipe(random.choice(recipe_names())).to_dict()
        what, codes = change_json(random, recipe), frozenset({0, 2})
        path.write_bytes(_dump(recipe))
    roll = random.random()
    if roll < 0.4:
        return Trial(what, ("recipes", "show", path), codes)
    if roll < 0.6:
        gate = ("validate", place.base("onnx"), "--reference", place.base("reference"), "--gate", path)
        return Trial(what, gate, codes | {0, 1} if text_is_limits(path) else codes)
    options = ("--samples", "2", "--sequence-length", "16", "--output", place.out)
    return Trial(what, ("quantize", place.base("model"), "--recipe", path, *options), codes, outputs=(place.out,))


def _dump(recipe: Any) -> bytes:
    try:
        return yaml.safe_dump(recipe).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"a: " + b"[" * 3000 + b"]" * 3000


def text_is_limits(path: Any) -> bool:
    """Whether a file may be a valid gate file after all."""
    return b"max_kl" in path.read_bytes()
