"""`python -m benchmarks.scale`: slices of large models, measured beside the predictions of `plan`.

    python -m benchmarks.scale                 everything, smallest first: hours
    python -m benchmarks.scale --model 30B-A3B --recipe gptq-w4a16-g128 --layers 1 2 4 --export gguf onnx

A slice has a model's exact widths and vocabulary, few layers, and random weights; it is made for its runs and removed
after them. Every command is a process of its own. Each result goes into a JSON file beside the table at once, so that a
table can be filled over several runs; `--table` only writes the table again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.measure import Run, measure
from benchmarks.scale.models import MODELS, make_slice
from benchmarks.scale.report import report

RESULTS = Path(__file__).parent.parent / "results" / "2026-11-scale.json"
RTN, GPTQ = "rtn-w4a16-g128", "gptq-w4a16-g128"


@dataclass(frozen=True)
class Wanted:
    """Runs of one slice: its recipes, and exports of the last recipe's folder."""

    model: str
    layers: int
    recipes: tuple[str, ...]
    samples: int = 128
    export: tuple[str, ...] = ()


# Smallest first. The widest have fewer rows, since solving takes their time and memory does not depend on rows.
ALL = (
    Wanted("30B-A3B", 1, (RTN, GPTQ)),
    Wanted("30B-A3B", 2, (RTN, GPTQ), export=("gguf", "onnx")),
    Wanted("8B", 1, (RTN, GPTQ)),
    Wanted("30B-A3B", 12, (RTN,), export=("gguf", "onnx")),
    Wanted("14B", 1, (RTN, GPTQ), 32),
    Wanted("235B-A22B", 1, (RTN, GPTQ), 32),
    Wanted("30B-A3B", 4, (GPTQ,)),
    Wanted("32B", 1, (RTN, GPTQ), 32),
    Wanted("Coder-480B-A35B", 1, (RTN, GPTQ), 16),
)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), help="one model, not all that is in the list")
    parser.add_argument("--recipe", nargs="*", default=[RTN, GPTQ])
    parser.add_argument("--layers", nargs="*", type=int, default=[1])
    parser.add_argument("--export", nargs="*", default=[], choices=["gguf", "onnx"], help="of the last recipe's folder")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--experts", type=int, help="fewer experts, to try something out; nothing is recorded")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-plan", action="store_true")
    parser.add_argument("--plan-only", action="store_true", help="predict again, and keep what was measured")
    parser.add_argument("--table", action="store_true", help="write the table again, measure nothing")
    return parser.parse_args()


def wanted(given: argparse.Namespace) -> Iterator[Wanted]:
    """The runs that the options ask for."""
    if given.table:
        return
    if given.model is None:
        yield from ALL
        return
    for layers in given.layers:
        yield Wanted(given.model, layers, tuple(given.recipe), given.samples, tuple(given.export))


def main() -> None:
    given = parse()
    base = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        for item in wanted(given):
            changes = {} if given.experts is None else {"num_experts": given.experts}
            source = make_slice(base / "source", item.model, item.layers, **changes)
            measured = predictions if given.plan_only else runs
            try:
                for record in measured(given, item, source, base):
                    print(json.dumps(record), file=sys.stderr, flush=True)
                    if given.experts is None:
                        keep(given.results, record)
            except RuntimeError as error:
                print(f"{item}: {error}", file=sys.stderr, flush=True)
            shutil.rmtree(base)
            base.mkdir()
    finally:
        shutil.rmtree(base)
    keep(given.results)


def keep(results: Path, *records: dict[str, Any]) -> None:
    """Add results, replacing older ones with the same key, and write the table."""
    kept = json.loads(results.read_text()) if results.exists() else []
    for record in records:
        kept = [old for old in kept if key(old) != key(record)] + [record]
    if kept:
        results.write_text(json.dumps(kept, indent=1) + "\n")
        results.with_suffix(".md").write_text(report(kept))


def key(record: dict[str, Any]) -> tuple[object, ...]:
    """The key of a record: a newer one with the same key replaces it."""
    return tuple(record[name] for name in ("model", "what", "layers", "rows"))


def runs(given: argparse.Namespace, item: Wanted, source: Path, base: Path) -> Iterator[dict[str, Any]]:
    """Yield the measurements of one slice, each as soon as it is finished."""
    out, scratch = base / "out", base / "scratch"
    common = {"model": item.model, "layers": item.layers, "rows": f"{item.samples} × {given.sequence_length}"}
    calibration = ["--samples", str(item.samples), "--sequence-length", str(given.sequence_length)]
    for recipe in item.recipes:
        shutil.rmtree(out, ignore_errors=True)
        scratch.mkdir()
        said = None if given.no_plan else planned(given, item, source, recipe)
        folders = ("--output", out, "--scratch", scratch)
        run = measure(["quantize", source, "--recipe", recipe, *folders, *calibration], given.threads, scratch)
        scratch.rmdir()  # which it can only be when it was left empty
        yield record(recipe, run, common, said)
    for kind in item.export:
        target = base / f"made-{kind}"
        yield record(f"{kind} of {item.recipes[-1]}", measure([kind, out, "--output", target], given.threads), common)
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def predictions(given: argparse.Namespace, item: Wanted, source: Path, base: Path) -> Iterator[dict[str, Any]]:
    """Yield the kept measurements of one slice with what `plan` says now."""
    rows = f"{item.samples} × {given.sequence_length}"
    kept = json.loads(given.results.read_text())
    for found in kept:
        of_slice = (found["model"], found["layers"], found["rows"]) == (item.model, item.layers, rows)
        if of_slice and found["what"] in item.recipes:
            yield {**found, "plan": prediction(planned(given, item, source, found["what"]))}


def planned(given: argparse.Namespace, item: Wanted, source: Path, recipe: str) -> Run:
    """What `plan` says of a recipe."""
    calibration = ["--samples", str(item.samples), "--sequence-length", str(given.sequence_length)]
    return measure(["plan", source, "--recipe", recipe, *calibration], given.threads)


def prediction(run: Run) -> dict[str, Any]:
    """The part of it that is kept."""
    return {name: run.result[name] for name in ("peak_rss_bytes", "disk_bytes", "seconds")}


def record(what: str, run: Run, common: dict[str, Any], said: Run | None = None) -> dict[str, Any]:
    """One line of the results."""
    values: dict[str, Any] = {
        **common,
        "what": what,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_s": round(run.wall_s, 1),
        "cpu_s": round(run.cpu_s, 1),
        "peak_rss": run.peak_rss,
        "scratch_bytes": run.scratch_bytes,
        "disk_bytes": run.result.get("bytes") or sum(file["bytes"] for file in run.result.get("files", [])),
    }
    if run.spent:
        values["spent"] = run.spent
    # Without calibration no tokens reach them.
    if run.result.get("experts") and run.result.get("calibration_sha256"):
        values["experts"] = {name: run.result["experts"].get(name) for name in ("min_tokens", "below_floor")}
    if said is not None:
        values["plan"] = prediction(said)
    return values


if __name__ == "__main__":
    main()
