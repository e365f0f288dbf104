"""`python -m benchmarks.quality`: our recipes and other tools side by side.

Same checkpoint, same calibration samples, same bits, one evaluator; every run in a process of its own.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.quality import checkpoints, report
from benchmarks.quality.plan import ALIASES, PEERS, jobs, schemes
from benchmarks.quality.runs import Limits, Setting, make_setting, result
from benchmarks.quality.venvs import NAMES, version

DOMAINS = ("english", "chinese", "code")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", nargs="+", default=["reference-model"], help=", ".join(checkpoints.MAKERS))
    parser.add_argument("--ours", nargs="*", metavar="RECIPE", help="names or YAML files; all by default")
    parser.add_argument("--peers", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--scheme", nargs="+", choices=[*PEERS, *ALIASES], help="all by default")
    parser.add_argument("--only", nargs="+", metavar="TOOL:METHOD", help="for example ours:gptq-w4a16-g128")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument(
        "--cross-domain", action="store_true", help=f"calibrate on {', '.join(DOMAINS)} in turn, measure on the others"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one run may take")
    parser.add_argument("--fresh", action="store_true", help="ignore cached results")
    parser.add_argument("--output", type=Path, default=Path("results.md"))
    return parser.parse_args()


def settings(given: argparse.Namespace) -> list[Setting]:
    """Every checkpoint with its rows; with --cross-domain once per calibration domain."""
    made = []
    for name in given.checkpoint:
        folder = checkpoints.make(name)
        for domain in DOMAINS if given.cross_domain else (None,):
            label = f"{name}, calibrated on {domain}" if domain else name
            made.append(make_setting(label, folder, given.samples, given.sequence_length, domain))
    return made


def main() -> None:
    # Raised as an exception, so that the running child is stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given = arguments()
    limits = Limits(given.threads, given.timeout, given.fresh)
    wanted = jobs(schemes(given.scheme), given.peers, given.ours)
    wanted = [job for job in wanted if given.only is None or f"{job.tool}:{job.method}" in given.only]
    results = []
    for setting in settings(given):
        for job in wanted:
            line = result(job, setting, limits)
            figure = f"KL {line['kl']:.6f}, {line['cpu_s']:.0f} CPU s" if "kl" in line else line["error"]
            print(f"{setting.name}  {job.scheme}  {job.tool} {job.method}: {figure}", file=sys.stderr, flush=True)
            results.append(line)
            report.write(results, given.output, preface(given))
    print(given.output.read_text(encoding="utf-8"))


def preface(given: argparse.Namespace) -> str:
    """The settings and versions with which the tables were measured."""
    peers = ", ".join(f"{NAMES[peer]} {version(peer)}" for peer in given.peers)
    text = "all other domains of the bundled held-out text" if given.cross_domain else "the whole bundled held-out text"
    return (
        f"{given.samples} × {given.sequence_length} calibration tokens, {text}, "
        f"{given.threads} threads. Peers: {peers}. Wall and CPU seconds cover the whole process, imports included."
    )


if __name__ == "__main__":
    main()
