"""`bench`: load time, prefill, decode and peak memory of artifacts on this device.

Each artifact runs in a process of its own, so that peak memory is that of one artifact. A warm-up comes first; then
prefill is timed over whole prompts, and decode token by token after a prompt. `scatter` is the standard deviation over
the repeats relative to their median: smaller differences are noise. Other work on the machine is measured too, and the
memory bandwidth, which bounds decoding, and energy where the platform counts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export import errors
from qwen3_export.core.memory import check_child, memory_named
from qwen3_export.core.process import end_with_parent
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.errors import ExportError, InputError
from qwen3_export.prove.environment import environment
from qwen3_export.prove.failed import measure_each
from qwen3_export.prove.gate import check
from qwen3_export.prove.meters import NOTICEABLE, EnergyMeter, MachineLoad, energy_meter, memory_bandwidth
from qwen3_export.prove.naming import unique_names
from qwen3_export.run.artifact import artifact_bytes, artifact_coverage, of_a_plan, open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions, Session
from qwen3_export.text.documents import document_ids, load_documents

# A larger scatter than this leads to a warning.
_SCATTERED = 0.1


@dataclass(frozen=True)
class Workload:
    """The work that is timed: prompts of these lengths, then `new_tokens` after the shortest."""

    prompt_tokens: tuple[int, ...] = (128, 512)
    new_tokens: int = 64
    repeat: int = 5
    threads: int | None = None
    texts: tuple[str, ...] = ()
    device: str | None = None


def bench(artifacts: Sequence[Path], workload: Workload, progress: Progress | None = None) -> dict[str, Any]:
    """The result of `bench`: `{results: [one per artifact], failed, passed, environment}`.

    An artifact that cannot be measured stands in `failed`; the error of a single one is raised.
    """
    progress, names = progress or Progress(), unique_names([str(path) for path in artifacts])
    with progress.bar("bench", len(artifacts)) as tick:

        def timed(number: int) -> dict[str, Any]:
            try:
                return _timed(artifacts[number], names[number], workload, progress)
            finally:
                tick()

        results, failed = measure_each(artifacts, timed, progress)
    return {"results": results, "failed": failed, "passed": not failed, "environment": environment()}


def _timed(artifact: Path, name: str, workload: Workload, progress: Progress) -> dict[str, Any]:
    found = {**_in_child(artifact, workload), "load_average": list(os.getloadavg())}
    found["bandwidth"] = _bandwidth(artifact, found, sparse=found.pop("sparse"))
    found["warnings"] = _warnings(found)
    for text in found["warnings"]:
        progress.warn(f"{name}: {text}")
    return found


def _bandwidth(artifact: Path, found: Mapping[str, Any], sparse: bool) -> dict[str, Any]:
    """The share of the memory bandwidth that decoding uses.

    A dense model reads all its weights for every token; of a mixture of experts the share is unknown.
    """
    weights = None if sparse else weight_bytes(artifact)
    if found["device"] != "cpu":
        # The bandwidth of a GPU's memory is not measured.
        return {"bytes_per_second": None, "weight_bytes": weights, "fraction": None}
    measured = memory_bandwidth(found["threads"])
    used = None if weights is None else weights * found["decode"]["tokens_per_second_p50"] / measured
    return {"bytes_per_second": measured, "weight_bytes": weights, "fraction": used}


def weight_bytes(artifact: Path) -> int:
    """Bytes of the files that hold an artifact's weights, a plan left out."""
    if artifact.is_file():
        return artifact_bytes(artifact)
    files = [*artifact.glob("*.data"), *artifact.glob("*.onnx_data*"), *artifact.glob("*.safetensors")]
    return sum(path.stat().st_size for path in files)


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """Warnings about figures that are doubtful."""
    texts, others = [], found["other_work"]
    if others is not None and others > NOTICEABLE:
        texts.append(f"other work kept {others:.1f} processors busy: figures are those of a busy machine")
    scatter = max([item["scatter"] for item in found["prefill"]] + [found["decode"]["scatter"]])
    if scatter > _SCATTERED:
        texts.append(f"repeats differ by {scatter:.0%}: take more with --repeat, or measure on a quiet machine")
    return texts


def judged(result: dict[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """A `bench` result with verdicts on latency limits; unchanged without limits."""
    if not limits:
        return result
    results = [{**item, "gate": check(item, limits)} for item in result["results"]]
    passed = result["passed"] and all(item["gate"]["passed"] for item in results)
    return {**result, "results": results, "passed": passed}


def _in_child(artifact: Path, workload: Workload) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, str(artifact), json.dumps(asdict(workload))]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        check_child(artifact, child)
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{artifact}: the runtime ended with status {child.returncode} ({last})") from None
    if "error" in answer:
        kind = getattr(errors, answer["error"])
        raise kind(answer["message"], answer["hint"])
    return answer


def measure(artifact: Path, workload: Workload) -> dict[str, Any]:
    """Time one artifact in this process."""
    longest = max(workload.prompt_tokens) + workload.new_tokens
    load = MachineLoad()
    started = time.perf_counter()
    session = open_session(artifact, RuntimeOptions(workload.threads, longest, device=workload.device))
    loaded = time.perf_counter() - started
    try:
        if session.context < longest:
            raise InputError(f"{artifact} holds {session.context} positions, {longest} were asked for")
        text = _text(artifact, session, workload)
        prefill = [_prefill(session, text[:count], workload.repeat) for count in dict.fromkeys(workload.prompt_tokens)]
        decode = _decode(session, text[: min(workload.prompt_tokens)], workload)
        return {
            "artifact": str(artifact),
            "runtime": session.runtime,
            "runtime_version": session.version,
            "device": session.device,
            **of_a_plan(session),
            "threads": session.threads,
            "load_seconds": loaded,
            "first_token": first_token(prefill),
            "prefill": prefill,
            "decode": decode,
            "peak_rss_bytes": peak_rss_bytes(),
            "other_work": load.others(),
            "sparse": artifact_coverage(artifact, session) is not None,
        }
    finally:
        session.close()


def _text(artifact: Path, session: Session, workload: Workload) -> NDArray[np.int32]:
    """Token ids of the text, repeated to the length of the workload."""
    tokenizer = tokenizer_of(artifact, session)
    documents = [document for text in workload.texts or ("heldout",) for document in load_documents(text)]
    ids = np.empty(0, np.int32)
    for document in documents:
        if len(ids) >= max(workload.prompt_tokens):
            break
        ids = np.concatenate([ids, document_ids(tokenizer, document)])
    if int(ids.max(initial=0)) >= session.vocab_size:
        raise InputError(f"{artifact}: the tokenizer has more tokens than the model's vocabulary")
    return np.resize(ids, max(workload.prompt_tokens))


def _prefill(session: Session, ids: NDArray[np.int32], repeat: int) -> dict[str, Any]:
    session.prefill(ids)
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        session.prefill(ids)
        seconds.append(time.perf_counter() - started)
    median = float(np.median(seconds))
    return {
        "prompt_tokens": len(ids),
        "seconds_p50": median,
        "seconds_p95": float(np.quantile(seconds, 0.95)),
        "tokens_per_second": len(ids) / median,
        "scatter": _scatter(seconds),
    }


def _scatter(seconds: Sequence[float]) -> float:
    """Standard deviation of the repeats, relative to their median."""
    return float(np.std(seconds) / np.median(seconds))


def first_token(prefill: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds until the first token after the longest prompt.

    These are the seconds of its prefill, whose last logits choose that token.
    """
    longest = max(prefill, key=lambda item: item["prompt_tokens"])
    return {key: longest[key] for key in ("prompt_tokens", "seconds_p50", "seconds_p95")}


def _decode(session: Session, ids: NDArray[np.int32], workload: Workload) -> dict[str, Any]:
    turns, joules, meter = [], 0.0, energy_meter()
    for turn in range(workload.repeat + 1):
        token = int(session.prefill(ids)[-1].argmax())
        if meter:
            meter.start()
        seconds = []
        for _ in range(workload.new_tokens):
            started = time.perf_counter()
            token = int(session.decode(token).argmax())
            seconds.append(time.perf_counter() - started)
        used = meter.stop() if meter else 0.0
        if turn > 0:
            turns.append(seconds)
            joules += used
    p50, p95, p99 = (float(value) for value in np.quantile(np.concatenate(turns), [0.5, 0.95, 0.99]))
    return {
        "tokens_per_second_p50": 1 / p50,
        "per_token_seconds_p50": p50,
        "p95": p95,
        "p99": p99,
        "scatter": _scatter([float(np.median(seconds)) for seconds in turns]),
        "energy": _energy(meter, joules, turns),
    }


def _energy(meter: EnergyMeter | None, joules: float, turns: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Joules per token and mean watts while decoding; None without a meter.

    They are those of everything that the meter counts, other work included.
    """
    if meter is None:
        return None
    count, seconds = sum(map(len, turns)), sum(map(sum, turns))
    return {"source": meter.source, "joules_per_token": joules / count, "watts": joules / seconds}


def main() -> None:
    """Child process of `bench`: prints one JSON line, also for an expected error."""
    end_with_parent()
    values = json.loads(sys.argv[2])
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        with memory_named(sys.argv[1]):
            answer = measure(Path(sys.argv[1]), Workload(**values))
    except ExportError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        answer = {"error": kind.__name__, "message": str(error), "hint": error.hint}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
