"""`python -m tests.hostile`: the whole campaign; exits with 1 when it finds faults."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.hostile.bases import make_bases
from tests.hostile.campaign import attempt, campaign, names


def main() -> int:
    """Entry point."""
    options = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("-n", "--each", type=int, default=0, help="Trials of every kind (default: 1,000 in all).")
    options.add_argument("--kind", action="append", choices=names())
    options.add_argument("--only", type=int, help="One trial by its number, with its output.")
    options.add_argument("--keep", type=Path, help="With --only: an empty folder to keep its files in.")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-bases-") as folder:
        bases = make_bases(Path(folder))
        if chosen.only is not None:
            verdict = attempt(chosen.kind[0], chosen.only, chosen.seed, bases, chosen.keep)
            print(verdict, verdict.outcome.out, verdict.outcome.err, f"code {verdict.outcome.code}", sep="\n")
            return bool(verdict.faults)
        kinds = chosen.kind or names()
        return _whole(chosen.seed, chosen.each or -(-1000 // len(kinds)), bases, kinds)


def _whole(seed: int, each: int, bases: Path, kinds: list[str]) -> int:
    tried = failed = 0
    started, spent = time.monotonic(), dict.fromkeys(kinds, 0.0)
    for verdict in campaign(seed, each, bases, kinds):
        tried += 1
        spent[verdict.kind] += verdict.outcome.seconds
        if verdict.faults:
            failed += 1
            print(verdict, flush=True)
    slowest = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in spent.items())
    print(f"seed {seed}, {time.monotonic() - started:.0f} s ({slowest})")
    print(f"{tried} tried, {failed} faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
