"""Output paths over inputs, through links, beside foreign files, and at impossible places."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.hostile.trial import REFUSED, Place, Trial

_FOLDERS, _FILES = ("quantize", "onnx", "triton"), ("gguf", "reference", "calibrate")
_BASE = {"quantize": "model", "reference": "model", "calibrate": "model", "report": "onnx", "triton": "onnx"}
_OPTIONS = {
    "quantize": ("--recipe", "rtn-w4a16-g32"),
    "reference": ("--tokens", "64", "--window", "32"),
    "calibrate": ("--samples", "2", "--sequence-length", "32"),
}


def make(random: Random, place: Place) -> Trial:
    """A command that writes to an odd place."""
    kind = random.choice((*_FOLDERS, *_FILES, *_FOLDERS, *_FILES, "report", "onnx-recipe", "gguf-recipe"))
    return random.choice(_PLACES)(random, place, kind)


def _command(
    place: Place, kind: str, out: object, source: Path | None = None, force: bool = False
) -> tuple[object, ...]:
    more = ("--force",) if force else ()
    if kind == "report":
        return (
            "validate",
            source or place.base("onnx"),
            "--reference",
            place.base("reference"),
            "--report",
            out,
            *more,
        )
    name, _, recipe = kind.partition("-")
    source = source or place.base("model" if recipe else _BASE.get(kind, "quantized"))
    options = _OPTIONS.get(name, ())
    return (name, source, *options, *(("--recipe", "rtn-w4a16-g32") if recipe else ()), "--output", out, *more)


def _is_file(kind: str) -> bool:
    return kind.partition("-")[0] in _FILES


def _foreign_partial(random: Random, place: Place, kind: str) -> Trial:
    """A foreign file lies where the unfinished output would be."""
    partial = place.folder / "out.partial"
    precious = place.folder / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    what = random.choice(("file", "link to file", "link to folder", "folder", "artifact", "pipe", "broken link"))
    if what == "file":
        partial.write_text("years of work")
    elif what == "link to file":
        partial.symlink_to("precious/thesis.txt")
    elif what == "link to folder":
        partial.symlink_to("precious")
    elif what == "folder":
        partial.mkdir()
        (partial / "thesis.txt").write_text("years of work")
    elif what == "artifact":
        place.copy(random.choice(("quantized", "onnx")), "out.partial")
    elif what == "pipe":
        os.mkfifo(partial)
    else:
        partial.symlink_to("absent")
    force = random.random() < 0.5
    return Trial(f"{kind}: out.partial is a {what}", _command(place, kind, place.out, force=force), REFUSED)


def _over_an_input(random: Random, place: Place, kind: str) -> Trial:
    """With `--force`, the output is an input, spelled in one of several ways."""
    base = _BASE.get(kind, "quantized")
    source = place.copy("model" if "-" in kind else base, "source")
    (place.folder / "sub").mkdir()
    spellings: dict[str, Callable[[], object]] = {
        "itself": lambda: source,
        "relative": lambda: "source",
        "through ..": lambda: "sub/../source",
        "a link to it": lambda: _link(place.folder / "link", source),
        "inside of it": lambda: source / "deep" / "out",
        "around it": lambda: place.folder,
        "its partial": lambda: _partial_of(source),
    }
    if _is_file(kind):
        shard = sorted(source.glob("*.safetensors"))[0]
        spellings |= {
            "its shard": lambda: shard,
            "its configuration": lambda: source / "config.json",
            "a hard link to its shard": lambda: _hard_link(place.folder / "hard", shard),
            "a link to its shard": lambda: _link(place.folder / "soft", shard),
        }
    what = random.choice(sorted(spellings))
    out = spellings[what]()
    given = place.folder / "source.partial" if what == "its partial" else source
    return Trial(
        f"{kind}: output is {what}", _command(place, kind, out, given, force=True), _codes(what), _allowed(what, out)
    )


def _codes(what: str) -> frozenset[int]:
    """Allowed exit codes: a link to an input may be replaced, an input not."""
    return frozenset({0, 2}) if what.startswith(("a link", "a hard link")) else REFUSED


def _allowed(what: str, out: object) -> tuple[Path, ...]:
    return (Path(str(out)),) if what.startswith(("a link", "a hard link")) else ()


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _hard_link(path: Path, target: Path) -> Path:
    os.link(target, path)
    return path


def _partial_of(source: Path) -> Path:
    """The source is the unfinished run that the command itself would continue."""
    source.rename(source.with_name("source.partial"))
    (source.with_name("source.partial") / ".qwen3-export-partial").touch()
    return source


def _failing_run_in_new_folders(random: Random, place: Place, kind: str) -> Trial:
    """The output's parent folders do not exist, and the run must fail."""
    source = place.copy(_BASE.get(kind, "quantized"), "source")
    victim = random.choice(sorted(path for path in source.iterdir() if path.suffix != ".txt"))
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 3])
    out = place.folder / "a" / "b" / "out"
    command = _command(place, kind, out, source)
    return Trial(f"{kind}: {victim.name} is cut, output in new folders", command, outputs=(place.folder / "a",))


def _no_place(random: Random, place: Place, kind: str) -> Trial:
    """Paths that no output can have."""
    (place.folder / "file").write_text("years of work")
    (place.folder / "full").mkdir()
    (place.folder / "full" / "thesis.txt").write_text("years of work")
    (place.folder / "loop").symlink_to("loop")
    os.mkfifo(place.folder / "pipe")
    out = random.choice(
        (
            "",
            ".",
            "..",
            "/",
            "/proc/out",
            "/dev/null",
            "/dev/null/out",
            "file/out",
            "full",
            "loop",
            "loop/out",
            "pipe",
            "a" * 256,
            "a" * 250,
            "x/" * 2100 + "out",
            "file/",
            "\udcff",
            "full/..",
            "pipe/out",
            "/sys/out",
            "/dev/full",
        )
    )
    if not _is_file(kind):
        out = random.choice((out, "file"))
    force = random.random() < 0.5
    if out == "file/" and _is_file(kind) and force:
        force = False
    return Trial(f"{kind}: output is {ascii(out)[:40]}", _command(place, kind, out, force=force), REFUSED)


def _awkward_but_fine(random: Random, place: Place, kind: str) -> Trial:
    """Paths that look odd but work."""
    name = random.choice(
        ("out put", "öut", "out.", "-out", "out\nput", "o'ut", "$HOME", "*", "%s", "{x}", "深/出", "a/../out", "out.d")
    )
    path = place.folder / name
    command = [f"./{part}" if part == name and name.startswith("-") else part for part in _command(place, kind, name)]
    first = place.folder / Path(os.path.normpath(path.relative_to(place.folder))).parts[0]
    if name == "a/../out":
        (place.folder / "a").mkdir()
    return Trial(f"{kind}: output is {name!a}", tuple(command), frozenset({0}), outputs=(first,))


_PLACES = (
    _foreign_partial,
    _foreign_partial,
    _over_an_input,
    _over_an_input,
    _failing_run_in_new_folders,
    _no_place,
    _awkward_but_fine,
)
