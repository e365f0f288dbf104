"""One Ray node and two compared, and a simulation of up to 64 nodes.

    python -m benchmarks.scale.cluster [--rows 64] [--layers 3] [--quick]

    namespace a, core 0   10.77.0.1   head, driver, one worker       ┐ veth
    namespace b, core 1   10.77.0.2   one worker                     ┘

It needs root (network namespaces, iproute2) and an idle machine with two cores. `--quick` takes few short rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.runtime.machine import describe
from benchmarks.scale.cluster_model import SLICES, curve
from benchmarks.scale.models import make_slice

RESULT = Path(__file__).parents[1] / "results" / "2026-11-cluster.md"
LENGTH, RECIPE = 512, "gptq-w4a16-g128"
COMMAND = [sys.executable, "-c", "from qwen3_export.cli import main; main()"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
HEAD, PORT = "10.77.0.1", 6391
# Nothing but these nodes reaches the namespaces, so they need no token of Ray.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    # As without Ray; by default other processes would come first.
    "RAY_worker_niceness": "0",
}


def sh(*command: object, check: bool = True) -> None:
    """Run a command, and show its output only when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ, **QUIET})
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def inside(node: int) -> list[str]:
    """The prefix of a command that runs it on one of the two nodes."""
    return ["ip", "netns", "exec", f"q3e-{'ab'[node]}", "taskset", "-c", str(node)]


@contextmanager
def namespaces() -> Iterator[None]:
    """Two network namespaces that reach each other and nothing else."""
    # Those of a run that was killed.
    for node in range(2):
        sh("ip", "netns", "delete", f"q3e-{'ab'[node]}", check=False)
    try:
        for node in range(2):
            sh("ip", "netns", "add", f"q3e-{'ab'[node]}")
        sh("ip", "link", "add", "q3e-a", "netns", "q3e-a", "type", "veth", "peer", "name", "q3e-b", "netns", "q3e-b")
        for node in range(2):
            own = ["ip", "-n", f"q3e-{'ab'[node]}"]
            sh(*own, "address", "add", f"10.77.0.{node + 1}/24", "dev", f"q3e-{'ab'[node]}")
            sh(*own, "link", "set", f"q3e-{'ab'[node]}", "up")
            sh(*own, "link", "set", "lo", "up")
        yield
    finally:
        for node in range(2):
            sh("ip", "netns", "delete", f"q3e-{'ab'[node]}", check=False)


@contextmanager
def ray_nodes(count: int) -> Iterator[None]:
    """A Ray cluster of one or two nodes, each with its namespace and core."""
    folder = tempfile.mkdtemp(prefix="q3r-")
    common = ["--num-cpus=1", f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
    processes = []
    try:
        for node in range(count):
            address = [f"--port={PORT}", "--head", "--include-dashboard=false", f"--temp-dir={folder}"]
            address = address if node == 0 else [f"--address={HEAD}:{PORT}"]
            command = [
                *inside(node),
                *RAY,
                "start",
                *address,
                f"--node-ip-address=10.77.0.{node + 1}",
                *common,
                "--block",
            ]
            processes.append(subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **QUIET},
                start_new_session=True,
            ))  # fmt: skip
            time.sleep(12)
        yield
    finally:
        for process in processes[::-1]:
            os.killpg(process.pid, 15)
            process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def quantize(source: Path, output: Path, rows: int, *more: str) -> dict[str, Any]:
    """The result of a run driven from core 0, with the command's seconds."""
    shutil.rmtree(output, ignore_errors=True)
    options = ["--recipe", RECIPE, "--samples", str(rows), "--sequence-length", str(LENGTH), "--threads", "1"]
    command = [*inside(0), *COMMAND, "quantize", str(source), "--output", str(output), *options, "--json", "-q", *more]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
    if done.returncode:
        raise SystemExit(done.stderr)
    return {**json.loads(done.stdout), "wall": time.monotonic() - started}


def same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same bytes."""
    return subprocess.run(["diff", "-r", str(first), str(second)], capture_output=True).returncode == 0


def measure(folder: Path, rows: int, layers: int) -> dict[str, dict[str, Any]]:
    """Each slice without Ray, on one node, without Ray again, and on two nodes.

    A machine's speed changes in minutes, so the overhead is that over the runs before and after it.
    """
    found: dict[str, dict[str, Any]] = {}
    sources = {name: make_slice(folder / name, base, layers, **more) for name, (base, more) in SLICES.items()}
    with namespaces():
        for name, source in sources.items():
            bytes_of = folder / f"{name}-0"
            found[name] = {"before": quantize(source, bytes_of, rows)}
            found[name]["1"] = on_nodes(1, source, bytes_of, rows)
            found[name]["after"] = quantize(source, bytes_of, rows)
            found[name]["2"] = on_nodes(2, source, bytes_of, rows)
    return found


def on_nodes(count: int, source: Path, wanted: Path, rows: int) -> dict[str, Any]:
    """The result of a run on so many nodes, which must give the wanted bytes."""
    output = wanted.with_name(f"{source.name}-{count}")
    with ray_nodes(count):
        result = quantize(source, output, rows, "--cluster", f"{HEAD}:{PORT}")
    assert len(result["workers"]) == count
    assert same(wanted, output), f"{source.name}: other bytes on {count} nodes"
    shutil.rmtree(output)
    return result


def report(found: dict[str, dict[str, Any]], rows: int, layers: int) -> str:
    """The results file."""
    lines = [
        "# One run on many machines",
        "",
        f"Measured {describe(('ray', 'torch'))}; `python -m benchmarks.scale.cluster --rows {rows} --layers {layers}`.",
        "",
        f"Two Ray nodes in two network namespaces, one core each; {RECIPE}, {rows} × {LENGTH} tokens, {layers} layers",
        "of width 1,024 (dense: 3,072 inner; moe: 32 experts of 384, 8 active). Seconds are the whole command's;",
        "the nodes were running before. The bytes are the same in all runs. Run in this order, from left to right; the",
        "overhead is that over the mean of the runs before and after.",
        "",
        "| model | no Ray, one core | one node | no Ray again | overhead | two nodes | two / one |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in found.items():
        before, one, after, two = (runs[key]["wall"] for key in ("before", "1", "after", "2"))
        share = f"{2 * one / (before + after) - 1:+.1%}"
        walls = f"{before:.1f} | {one:.1f} | {after:.1f} | {share} | {two:.1f} | {two / one:.2f}"
        lines.append(f"| {name} | {walls} |")
    lines += [
        "",
        "Targets: overhead at most 10 %, two nodes at most 0.60 × one.",
        "",
        "## Where a worker's time goes",
        "",
    ]
    lines += ["| run | work | pieces | working s | waiting | writing | reading | MB written | MB read |"]
    lines += ["| --- " * 9 + "|"]
    for name, runs in found.items():
        for key in ("1", "2"):
            for label, item in runs[key]["workers"][0]["shared"].items():
                times = " | ".join(f"{item[part]:.1f}" for part in ("working", "waiting", "writing", "reading"))
                megabytes = f"{item['bytes_written'] / 1e6:.0f} | {item['bytes_read'] / 1e6:.0f}"
                lines.append(f"| {name}, {key} nodes | {label} | {item['pieces']} | {times} | {megabytes} |")
    return "\n".join([*lines, "", *curve(found, rows * LENGTH, layers)]) + "\n"


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 rows, one layer; nothing is written")
    given = parser.parse_args()
    rows, layers = (8, 1) if given.quick else (given.rows, given.layers)
    with tempfile.TemporaryDirectory(prefix="q3e-bench-") as folder:
        text = report(measure(Path(folder), rows, layers), rows, layers)
    print(text)
    if not given.quick:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
