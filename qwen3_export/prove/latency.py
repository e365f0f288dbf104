"""`bench`: how fast an artifact loads, reads a prompt and writes, on this device.

Each artifact runs in a process of its own, so that its peak memory is its own. Every figure is taken
after a warm-up; prefill is timed over whole prompts, decode token by token after a prompt.
"""

from __future__ import annotations

import json
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
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.errors import ExportError, InputError
from qwen3_export.prove.environment import environment
from qwen3_export.prove.gate import check
from qwen3_export.run.artifact import open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions, Session
from qwen3_export.text.documents import document_ids, load_documents


@dataclass(frozen=True)
class Workload:
    """What is timed: prompts of these lengths, then `new_tokens` more after the shortest of them."""

    prompt_tokens: tuple[int, ...] = (128, 512)
    new_tokens: int = 64
    repeat: int = 5
    threads: int | None = None
    texts: tuple[str, ...] = ()


def bench(artifacts: Sequence[Path], workload: Workload, progress: Progress | None = None) -> dict[str, Any]:
    """`{results: [one per artifact], passed}`, the contract's fields."""
    results = []
    with (progress or Progress()).bar("bench", len(artifacts)) as tick:
        for artifact in artifacts:
            results.append(_in_child(artifact, workload))
            tick()
    return {"results": results, "passed": True, "environment": environment()}


def judged(result: dict[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """A `bench` result with the verdict of some limits on latency; as it was without any."""
    if not limits:
        return result
    results = [{**item, "gate": check(item, limits)} for item in result["results"]]
    return {**result, "results": results, "passed": all(item["gate"]["passed"] for item in results)}


def _in_child(artifact: Path, workload: Workload) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, str(artifact), json.dumps(asdict(workload))]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{artifact}: the runtime ended with status {child.returncode} ({last})") from None
    if "error" in answer:
        kind = getattr(errors, answer["error"])
        raise kind(answer["message"], answer["hint"])
    return answer


def measure(artifact: Path, workload: Workload) -> dict[str, Any]:
    """Time one artifact in this process."""
    longest = max(workload.prompt_tokens) + workload.new_tokens
    started = time.perf_counter()
    session = open_session(artifact, RuntimeOptions(threads=workload.threads, context=longest))
    loaded = time.perf_counter() - started
    try:
        if session.context < longest:
            raise InputError(f"{artifact} holds {session.context} positions, {longest} were asked for")
        text = _text(artifact, session, workload)
        prefill = [_prefill(session, text[:count], workload.repeat) for count in workload.prompt_tokens]
        decode = _decode(session, text[: min(workload.prompt_tokens)], workload)
        return {
            "artifact": str(artifact),
            "runtime": session.runtime,
            "runtime_version": session.version,
            "device": session.device,
            "threads": session.threads,
            "load_seconds": loaded,
            "first_token": first_token(prefill),
            "prefill": prefill,
            "decode": decode,
            "peak_rss_bytes": peak_rss_bytes(),
        }
    finally:
        session.close()


def _text(artifact: Path, session: Session, workload: Workload) -> NDArray[np.int32]:
    """Token ids of the text, repeated until they are long enough."""
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
    }


def first_token(prefill: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds until the first token of the longest prompt: its prefill, whose last logits choose that token."""
    longest = max(prefill, key=lambda item: item["prompt_tokens"])
    return {key: longest[key] for key in ("prompt_tokens", "seconds_p50", "seconds_p95")}


def _decode(session: Session, ids: NDArray[np.int32], workload: Workload) -> dict[str, float]:
    seconds = []
    for turn in range(workload.repeat + 1):
        token = int(session.prefill(ids)[-1].argmax())
        for _ in range(workload.new_tokens):
            started = time.perf_counter()
            token = int(session.decode(token).argmax())
            if turn > 0:
                seconds.append(time.perf_counter() - started)
    p50, p95, p99 = (float(value) for value in np.quantile(seconds, [0.5, 0.95, 0.99]))
    return {"tokens_per_second_p50": 1 / p50, "per_token_seconds_p50": p50, "p95": p95, "p99": p99}


def main() -> None:
    """Child process of `bench`: one JSON line, an expected error included."""
    values = json.loads(sys.argv[2])
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        answer = measure(Path(sys.argv[1]), Workload(**values))
    except ExportError as error:
        answer = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
