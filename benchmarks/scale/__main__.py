"""`python -m benchmarks.scale`: slices of large models quantized and exported, beside what `plan` says beforehand.

    python -m benchmarks.scale --model 30B-A3B --recipe rtn gptq-w4a16-g128 --layers 1 2 4 --export gguf onnx

Slices have a model's exact widths and vocabulary and random weights; they are made and removed on the way. Every
command is a process of its own. What was measured is kept in a JSON file beside the table, so that a table can be
filled run by run; `--table` only writes it again.
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
from pathlib import Path
from typing import Any

from benchmarks.scale.measure import Run, measure
from benchmarks.scale.models import MODELS, make_slice
from benchmarks.scale.report import report

RESULTS = Path(__file__).parent.parent / "results" / "2026-11-scale.json"


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", default=[], choices=list(MODELS))
    parser.add_argument("--recipe", nargs="*", default=["rtn-w4a16-g128", "gptq-w4a16-g128"])
    parser.add_argument("--layers", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--export", nargs="*", default=[], choices=["gguf", "onnx"], help="of the last recipe's folder")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--experts", type=int, help="fewer experts, to try something out; nothing is recorded")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-plan", action="store_true")
    parser.add_argument("--table", action="store_true", help="write the table again, measure nothing")
    return parser.parse_args()


def main() -> None:
    given = parse()
    kept: list[dict[str, Any]] = json.loads(given.results.read_text()) if given.results.exists() else []
    base = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        for model in () if given.table else given.model:
            for layers in given.layers:
                changes = {} if given.experts is None else {"num_experts": given.experts}
                source = make_slice(base / "source", model, layers, **changes)
                for record in runs(given, model, layers, source, base):
                    print(json.dumps(record), file=sys.stderr, flush=True)
                    if given.experts is None:
                        kept = [old for old in kept if key(old) != key(record)] + [record]
                        given.results.write_text(json.dumps(kept, indent=1) + "\n")
                shutil.rmtree(source)
    finally:
        shutil.rmtree(base)
    given.results.with_suffix(".md").write_text(report(kept))


def key(record: dict[str, Any]) -> tuple[object, ...]:
    """What two records of one measurement have in common."""
    return tuple(record[name] for name in ("model", "what", "layers", "rows"))


def runs(given: argparse.Namespace, model: str, layers: int, source: Path, base: Path) -> Iterator[dict[str, Any]]:
    """All measurements of one slice, each as soon as it is made."""
    for number, recipe in enumerate(given.recipe):
        calibration = ["--samples", str(given.samples), "--sequence-length", str(given.sequence_length)]
        planned = None if given.no_plan else measure(["plan", source, "--recipe", recipe, *calibration], given.threads)
        scratch, out = base / "scratch", base / "out"
        scratch.mkdir()
        command = ["quantize", source, "--recipe", recipe, "--output", out, "--scratch", scratch, *calibration]
        run = measure(command, given.threads, scratch)
        common = {"model": model, "layers": layers, "rows": f"{given.samples} × {given.sequence_length}"}
        yield record(recipe, run, common, planned)
        if number == len(given.recipe) - 1:
            for kind in given.export:
                target = base / f"made-{kind}"
                made = measure([kind, out, "--output", target], given.threads)
                yield record(kind, made, common, None)
                shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.rmtree(out)
        scratch.rmdir()


def record(what: str, run: Run, common: dict[str, Any], planned: Run | None) -> dict[str, Any]:
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
    if run.result.get("experts"):
        values["experts"] = {name: run.result["experts"].get(name) for name in ("min_tokens", "below_floor")}
    if planned is not None:
        values["plan"] = {name: planned.result[name] for name in ("peak_rss_bytes", "disk_bytes", "seconds")}
    return values


if __name__ == "__main__":
    main()
