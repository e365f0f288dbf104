"""`validate`: measures every artifact in its own runtime against one reference."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.progress import Progress
from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError
from qwen3_export.prove.drift import measure
from qwen3_export.prove.environment import environment
from qwen3_export.prove.failed import measure_each
from qwen3_export.prove.gate import check
from qwen3_export.prove.latency import Workload, bench
from qwen3_export.prove.limits import is_latency, parse_limit, refuse_unmeasurable, refuse_without_experts
from qwen3_export.prove.reference import Reference, ReferenceFile
from qwen3_export.prove.sidecars import compare_sidecars
from qwen3_export.prove.tasks import Task, compare, solve
from qwen3_export.run.artifact import artifact_bytes, artifact_coverage, of_a_plan, open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import Samples, heldout_samples, subsample
from qwen3_export.text.tokenizer import ModelTokenizer

WINDOW = 256
# Prompt lengths of the latency run for a gate file: short enough for a model with 512 positions.
GATE_PROMPTS = (128, 256)


def held_out(folder: Path, texts: Sequence[str] = (), window: int = WINDOW, tokens: int | None = None) -> Samples:
    """Held-out samples in a model's tokens, from the bundled text or given files."""
    documents = [document for text in texts or ["heldout"] for document in load_documents(text)]
    return subsample(heldout_samples(ModelTokenizer(folder), documents, window), tokens)


def open_reference(
    spec: str,
    texts: Sequence[str] = (),
    tokens: int | None = None,
    progress: Progress | None = None,
    budget_tokens: int | None = None,
) -> Reference:
    """Open a reference file, or the original itself on `texts` with `tokens`."""
    path = Path(spec)
    if path.is_file():
        if texts or tokens:
            raise InputError(f"{spec}: a reference file brings its own text", "leave --text and --tokens away")
        if budget_tokens is not None:
            raise InputError(f"{spec}: its chats are answered already", "give --thinking-budget to `reference`")
        _refuse_artifact(path)
        return ReferenceFile(path)
    from qwen3_export.prove.original import LiveReference

    checkpoint = open_source(spec)
    samples = held_out(checkpoint.folder, texts, min(WINDOW, checkpoint.config.max_position), tokens)
    return LiveReference(checkpoint, samples, progress, budget_tokens)


def _refuse_artifact(path: Path) -> None:
    """Raise InputError when the reference is an artifact."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" and path.suffix != ".onnx":
            return
    raise InputError(
        f"{path}: an artifact; the original it is measured against was expected",
        "give the original's folder, or a file that `qwen3-export reference` wrote of it",
    )


def validate(
    artifacts: Sequence[Path],
    reference: Reference,
    limits: Mapping[str, float] | None = None,
    options: RuntimeOptions | None = None,
    progress: Progress | None = None,
    on: str = "mean",
    tasks: Sequence[Task] = (),
    explained: bool = False,
) -> dict[str, Any]:
    """The result of `validate`: `{results: [one per artifact], failed, passed, …}`.

    An artifact that cannot be measured stands in `failed`; the error of a single one is raised.
    `on`: whether a limit applies to the mean or to the worse end of its interval. With limits on latency, latency is
    measured too and adds the fields of `prove.latency.bench`. `tasks` are answered by both models. `explained` adds
    where drift comes from; it needs Hugging Face folders, and the original itself as reference.
    """
    if explained:
        _check_explainable(artifacts, reference)
    limits = {name: parse_limit(name, value) for name, value in (limits or {}).items()}
    chats, sidecars = reference.chats is not None, reference.sidecars is not None
    measured = {"tasks": bool(tasks), "sidecars": sidecars, "thinking": chats, "no_thinking": chats}
    refuse_unmeasurable(limits, reference.samples.domains, measured)
    right = reference.tasks_right(tasks, progress) if tasks else []

    def measured_one(number: int) -> dict[str, Any]:
        artifact = artifacts[number]
        checkpoint = open_checkpoint(artifact) if explained else None
        result = _validate_one(artifact, reference, limits, options, progress, tasks, right)
        if any(is_latency(name) for name in limits):
            given = options or RuntimeOptions()
            workload = Workload(GATE_PROMPTS, threads=given.threads, device=given.device)
            result |= bench([artifact], workload, progress)["results"][0]
        if checkpoint:
            result["explain"] = _explained(reference, checkpoint, progress)
        return {**result, "gate": check(result, limits, on)}

    results, failed = measure_each(artifacts, measured_one, progress or Progress())
    passed = not failed and all(result["gate"]["passed"] for result in results)
    return {"results": results, "failed": failed, "passed": passed, "environment": environment()}


def rounding_errors(artifact: Path) -> dict[str, dict[str, float]] | None:
    """Rounding errors from a quantized folder's manifest, None without one.

    `{kind of linear: {layer: error}}`, the mean over a layer's experts.
    """
    tensors = read_manifest(artifact).get("tensors") if artifact.is_dir() else None
    found: dict[str, dict[str, list[float]]] = {}
    for name, item in tensors.items() if isinstance(tensors, dict) else ():
        parts = name.split(".")
        error = item.get("error") if isinstance(item, dict) else None
        if parts[:2] == ["model", "layers"] and len(parts) > 3 and isinstance(error, float):
            found.setdefault(parts[-1], {}).setdefault(parts[2], []).append(error)
    averaged = {kind: {n: sum(errors) / len(errors) for n, errors in layers.items()} for kind, layers in found.items()}
    return averaged or None


def _check_explainable(artifacts: Sequence[Path], reference: Reference) -> None:
    """Raise InputError where drift cannot be traced."""
    if isinstance(reference, ReferenceFile):
        raise InputError(
            "--explain: a reference file holds the original's answers, not its blocks",
            "give the original itself as --reference",
        )
    from qwen3_export.prove.explain import check_explainable

    for artifact in artifacts:
        check_explainable(artifact)


def _explained(reference: Reference, artifact: Checkpoint, progress: Progress | None) -> dict[str, Any]:
    from qwen3_export.prove.explain import explain
    from qwen3_export.prove.original import LiveReference

    assert isinstance(reference, LiveReference)
    return explain(reference.checkpoint, artifact, reference.samples, progress)


def _validate_one(
    artifact: Path,
    reference: Reference,
    limits: Mapping[str, float],
    options: RuntimeOptions | None,
    progress: Progress | None,
    tasks: Sequence[Task],
    right: Sequence[bool],
) -> dict[str, Any]:
    started = time.monotonic()
    with (progress or Progress()).bar(f"load {artifact.name}", 1) as loaded:
        session = open_session(artifact, options)
        loaded()
    try:
        experts = artifact_coverage(artifact, session)
        refuse_without_experts(limits, artifact, experts)
        drift = measure(session, reference, artifact.name, progress)
        if tasks:
            ours = solve(session, tokenizer_of(artifact, session), tasks, artifact.name, progress)
            drift["tasks"] = compare(tasks, right, ours)
        return {
            "artifact": str(artifact),
            "runtime": session.runtime,
            "runtime_version": session.version,
            "device": session.device,
            **of_a_plan(session),
            "settings": {"exact": bool(options and options.exact), "threads": session.threads},
            "reference_sha256": reference.source_sha256,
            "text_sha256": reference.samples.sha256,
            **drift,
            "bytes": artifact_bytes(artifact),
            "experts": experts,
            "sidecars": compare_sidecars(artifact, session, reference.sidecars),
            "rounding_errors": rounding_errors(artifact),
            "seconds": time.monotonic() - started,
        }
    finally:
        session.close()
