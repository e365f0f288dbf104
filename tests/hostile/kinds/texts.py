"""Calibration and held-out text: odd encodings, malformed rows, things that are no files."""

from __future__ import annotations

import json
from random import Random

from tests.hostile.damage import TEXTS, odd, replace_file
from tests.hostile.trial import Place, Trial

_WORDS = "the ocean is wide and the ship is small; every wave tells of another shore "


def make(random: Random, place: Place) -> Trial:
    """A text file and a command that reads it."""
    path = place.folder / f"text.{random.choice(('txt', 'jsonl', 'jsonl', 'json', 'parquet'))}"
    roll = random.random()
    if roll < 0.15:
        path.write_bytes(TEXTS[random.choice(list(TEXTS))])
        what = f"{path.suffix}: {path.read_bytes()[:20]!r}"
    elif roll < 0.2:
        what = replace_file(random, path)
    elif roll < 0.4:
        encoding = random.choice(("utf-8-sig", "utf-16", "latin-1", "utf-8"))
        text = random.choice(("", "\r\n", "é ", "\x00", "￿", "<|im_end|>", _WORDS)) * random.choice((1, 50, 5000))
        path.write_bytes(text.encode(encoding, "replace"))
        what = f"{path.suffix} in {encoding}: {text[:10]!r}"
    else:
        rows = [_row(random) for _ in range(random.choice((1, 3, 100)))]
        end = random.choice(("\n", "\r\n", "\n\n"))
        path.write_bytes(end.join(rows).encode("utf-8", "surrogatepass"))
        what = f"{path.suffix}: {rows[0][:60]!r}"
    options = ("--samples", "2", "--sequence-length", "32", "--output", place.out)
    command: tuple[object, ...] = random.choice(
        (
            ("quantize", place.base("model"), "--recipe", "gptq-w4a16-g32", "--calibration", path, *options),
            ("reference", place.base("model"), "--text", path, "--window", "32", "--output", place.out),
            (
                "bench",
                place.base("onnx"),
                "--text",
                path,
                *("--prompt-tokens", "8", "--new-tokens", "1", "--repeat", "1"),
            ),
        )
    )
    return Trial(what, command, outputs=(place.out,) if place.out in command else ())


def _row(random: Random) -> str:
    words = _WORDS * random.choice((1, 20))
    row: object = random.choice(
        (
            {"text": words},
            {"text": odd(random)},
            {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": odd(random)}]},
            {"messages": odd(random)},
            {"messages": [{"role": odd(random), "content": words}]},
            {"conversations": [{"from": "human", "value": words}, {"from": "gpt", "value": words}]},
            {"instruction": words, "input": "", "output": odd(random)},
            odd(random),
        )
    )
    try:
        return json.dumps(row)
    except (ValueError, RecursionError):
        return "{}"
