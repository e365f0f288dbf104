"""Quantizes and measures; each step is cached by everything that can change its result."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qwen3_export
from benchmarks.quality.plan import Job, find_recipe, recipe_spec
from benchmarks.quality.process import run
from benchmarks.quality.samples import write_matrix, write_samples
from benchmarks.quality.venvs import PEERS, cache_folder, python_of, version
from qwen3_export.core.source import open_source
from qwen3_export.text.documents import Document, load_documents
from qwen3_export.text.samples import calibration_samples, heldout_samples
from qwen3_export.text.tokenizer import ModelTokenizer

HERE = Path(__file__).resolve().parent
PACKAGE = Path(qwen3_export.__file__).resolve().parent
WINDOW = 256
# Folders of the package whose code can change a recipe's output.
CODE = tuple(f"{wing}/**/*.py" for wing in ("core", "ggml", "model", "solve", "text"))


@dataclass(frozen=True)
class Setting:
    """A checkpoint with the rows for calibration and for measuring, shared by all tools."""

    name: str
    checkpoint: Path
    calibration: Path
    rows: Path
    heldout: Path
    samples: int
    length: int
    identity: dict[str, Any]
    domain: str | None


@dataclass(frozen=True)
class Limits:
    """Threads, timeouts and caching of the runs."""

    threads: int = 2
    timeout: float = 1800.0
    fresh: bool = False


def make_setting(name: str, checkpoint: Path, samples: int, length: int, domain: str | None) -> Setting:
    """Write a checkpoint's rows from the bundled text or one domain, seed 0."""
    source = open_source(str(checkpoint))
    tokenizer = ModelTokenizer(source.folder)
    documents = [d for d in load_documents("bundled") if domain in (None, d.domain)]
    calibration = calibration_samples(tokenizer, documents, samples, length, seed=0)
    heldout = heldout_samples(tokenizer, load_documents("heldout"), WINDOW)
    identity = {"checkpoint": source.sha256, "rows": calibration.sha256, "heldout": heldout.sha256}
    folder = cache_folder() / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    text, matrix, windows = (folder / f"{key(identity)}-{end}" for end in ("text.jsonl", "rows.npy", "heldout.npz"))
    write_text(text, documents)
    write_matrix(matrix, calibration)
    write_samples(windows, heldout)
    return Setting(name, source.folder, text, matrix, windows, len(calibration.ids), length, identity, domain)


def write_text(path: Path, documents: list[Document]) -> None:
    """Write documents from which our command line makes the .npy file's rows."""
    lines = []
    for document in documents:
        field = "text" if isinstance(document.content, str) else "messages"
        lines.append(json.dumps({"domain": document.domain, field: document.content}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def key(values: object) -> str:
    """A short content hash."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def sources_hash(folder: Path, pattern: str) -> str:
    """Hash of the source files that a result depends on."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def identity_of(job: Job, setting: Setting, threads: int) -> dict[str, Any]:
    """Everything that decides the bytes of a run's output."""
    base = {"method": job.method, "scheme": job.scheme, "threads": threads, **setting.identity}
    base.pop("heldout")
    if job.tool == "ours":
        code = [sources_hash(PACKAGE, pattern) for pattern in CODE]
        return {**base, "recipe": find_recipe(job.method).sha256, "code": code}
    pins, driver = PEERS / f"{job.tool}.txt", PEERS / f"{job.tool}.py"
    return {**base, "pins": pins.read_text(), "driver": driver.read_text()}


def command(job: Job, setting: Setting, output: Path) -> list[str | Path]:
    """The command line of a run: ours, or a driver in the peer's Python."""
    if job.tool == "ours":
        return [
            *(sys.executable, "-c", "from qwen3_export.cli import main; main()", "quantize", setting.checkpoint),
            *("--recipe", recipe_spec(job.method), "--output", output / "model", "--calibration", setting.calibration),
            *("--samples", str(setting.samples), "--sequence-length", str(setting.length), "--seed", "0", "--json"),
        ]
    # -P, since a driver has the name of the peer's package and would hide it.
    return [
        *(python_of(job.tool), "-P", PEERS / f"{job.tool}.py"),
        *("--model", setting.checkpoint, "--rows", setting.rows, "--method", job.method),
        *("--scheme", job.scheme, "--output", output / "model", "--result", output / "result.json"),
    ]


def cached(path: Path, fresh: bool, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON at `path`, made first when it is missing."""
    if fresh or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=1))
    return json.loads(path.read_text())


def quantize(job: Job, setting: Setting, limits: Limits) -> tuple[Path, dict[str, Any]]:
    """Run a tool; returns its folder and what it cost."""
    folder = cache_folder() / "runs" / key(identity_of(job, setting, limits.threads))

    def make() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        extra = {"PYTHONPATH": str(PACKAGE.parent)} if job.tool == "ours" else {}
        cost = run(command(job, setting, folder), folder, limits.threads, limits.timeout, **extra)
        tool = f"{job.tool} {version(job.tool)}" if job.tool != "ours" else f"qwen3-export {qwen3_export.__version__}"
        return {"version": tool, **cost.to_dict()}

    return folder / "model", cached(folder / "cost.json", limits.fresh, make)


def evaluate(setting: Setting, model: Path, limits: Limits) -> dict[str, Any]:
    """Measure a folder against its original, in a process of its own."""
    evaluator = sources_hash(HERE, "[ef][vo]*.py")
    identity = [setting.identity["checkpoint"], setting.identity["heldout"]]
    quality = model.parent / f"quality-{key([evaluator, *identity])}"
    truth = cache_folder() / "truth" / f"{key(identity)}.npy"
    truth.parent.mkdir(parents=True, exist_ok=True)

    def make() -> dict[str, Any]:
        shutil.rmtree(quality, ignore_errors=True)
        quality.mkdir()
        files = (setting.checkpoint, model, setting.heldout, truth, quality / "measured.json")
        paths = f"{PACKAGE.parent}:{HERE.parent.parent}"
        line = (sys.executable, "-m", "benchmarks.quality.evaluate", *files)
        run(line, quality, 1, limits.timeout, PYTHONPATH=paths)
        return json.loads((quality / "measured.json").read_text())

    return cached(quality / "quality.json", limits.fresh, make)


def result(job: Job, setting: Setting, limits: Limits) -> dict[str, Any]:
    """One line of the table; a run that failed says why in `error`."""
    line = {"checkpoint": setting.name, "scheme": job.scheme, "tool": job.tool, "method": job.method}
    try:
        model, cost = quantize(job, setting, limits)
        measured = evaluate(setting, model, limits)
        return {**cost, **measured, **overall(measured["domains"], setting.domain), **line}
    except RuntimeError as error:
        return {**line, "error": str(error)}


def overall(domains: dict[str, dict[str, float]], without: str | None) -> dict[str, float]:
    """Means over all tokens, without those of the calibration domain."""
    kept = [item for domain, item in domains.items() if domain != without]
    tokens = sum(item["tokens"] for item in kept)
    return {"tokens": tokens, **{m: sum(i["tokens"] * i[m] for i in kept) / tokens for m in ("kl", "top1")}}
