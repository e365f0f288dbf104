"""Reports, limits and tolerances, damaged: what `gate`, `compare` and `inspect` make of them."""

from __future__ import annotations

from random import Random

from tests.hostile.damage import change_json, change_json_file, dump_json
from tests.hostile.trial import Place, Trial

_TOLERANCES = (
    *("kl_mean: 5%", "kl_mean: -1", "kl_mean: 1e999", "bytes: 9MB", "bytes: [1]", "latency: x", "x: 1", "[]"),
    *("domains: 3", "domains: {math: {kl_mean: 1}}", "domains: {math: 3}", "prefill.8.p50: 9%", "top1_agreement: .nan"),
)


def make(random: Random, place: Place) -> Trial:
    """A report folder beside its sound original."""
    path, out = place.copy("report"), place.out
    what = change_json_file(random, path / "report.json")
    commands: tuple[tuple[object, ...], ...] = (
        ("gate", path, "--baseline", place.base("report"), "--report", out),
        ("gate", place.base("report"), "--baseline", path),
        ("compare", path, place.base("report"), "--report", out),
        ("inspect", path),
    )
    if random.random() < 0.15:
        tolerance = place.folder / "tolerance.yaml"
        tolerance.write_text(random.choice(_TOLERANCES))
        given = ("gate", place.base("report"), "--baseline", place.base("report"), "--tolerance", tolerance)
        return Trial(tolerance.read_text(), given, frozenset({0, 1, 2}))
    command = random.choice(commands)
    if random.random() < 0.1:
        values = [1]
        what = change_json(random, values)
        (path / "qwen3-export.json").write_bytes(dump_json(values))
    return Trial(what, command, frozenset({0, 1, 2}), outputs=(out,) if "--report" in command else ())
