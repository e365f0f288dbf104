"""`quantize`: source, recipe and calibration in; a QuantizedCheckpoint folder out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3_export import __version__
from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.layouts import DEFAULT, layout
from qwen3_export.core.manifest import refuse_existing, staged_folder
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.core.recipe import QuantScheme, Recipe
from qwen3_export.errors import InputError, MissingRuntimeError, RecipeError
from qwen3_export.model.workers import workers
from qwen3_export.solve.folder import QuantizedFolder
from qwen3_export.solve.limits import check_disk, check_memory
from qwen3_export.solve.method import load_method
from qwen3_export.solve.self_text import self_rows
from qwen3_export.solve.stream import Job, SolvedLinear, embed_rows, forget_hidden, solve_block
from qwen3_export.text import ModelTokenizer, Rows, calibration_rows, load_documents


@dataclass(frozen=True)
class Settings:
    """How to run; only `calibration`, `samples`, `sequence_length` and `seed` can change the bytes."""

    calibration: str = "bundled"
    samples: int | None = None
    sequence_length: int | None = None
    seed: int = 0
    memory: int | None = None
    device: str = "cpu"
    threads: int | None = None
    resume: bool = True
    force: bool = False
    layout: str = DEFAULT


def quantize(
    checkpoint: Checkpoint, recipe: Recipe, output: Path, settings: Settings, progress: Progress | None = None
) -> dict[str, Any]:
    """Quantize a checkpoint into the folder `output`; returns the result that `--json` prints.

    Raises RecipeError, InputError or ResourceError before the long work when it cannot succeed. A run
    that was stopped goes on from its last finished block and ends with the same bytes.
    """
    progress, started = progress or Progress(), time.monotonic()
    refuse_existing(output.absolute(), settings.force)
    if checkpoint.is_quantized:
        raise InputError(f"{checkpoint.folder} is quantized already", "give the 16-bit original")
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise MissingRuntimeError(
            f"--device {settings.device}: this torch sees no CUDA device", "install a CUDA build of torch, or use cpu"
        )
    method, options = load_method(recipe)
    recipe.check_against(checkpoint.config.all_linears())
    _check_layout(checkpoint, recipe, settings.layout)
    rows = _calibration(checkpoint, recipe, settings, progress) if method.NEEDS_INPUTS else None
    original = method.needs_original(options)
    check_memory(checkpoint.config, rows, original, settings.memory)
    identity = {
        "source": checkpoint.sha256,
        "recipe": recipe.sha256,
        "calibration": rows.sha256 if rows else None,
        "seed": settings.seed,
        "layout": settings.layout,
        "version": __version__,
    }
    with staged_folder(output, settings.force, resume=True) as partial, workers(settings.threads) as pool:
        target = QuantizedFolder(partial, checkpoint, settings.layout, identity)
        try:
            if not settings.resume:
                target.start_over()
            check_disk(checkpoint, recipe, rows, original, partial)
            job = Job(checkpoint, recipe, method, options, rows, pool, target.scratch, settings.device)
            blocks, resumed = _run(job, target, progress)
            manifest = _manifest(checkpoint, recipe, rows, settings, blocks)
            target.finish(recipe, manifest, _schemes(recipe, blocks))
        except Exception:
            target.drop_unless_resumable()
            raise
    return _result(output, manifest, resumed, time.monotonic() - started)


def _check_layout(checkpoint: Checkpoint, recipe: Recipe, name: str) -> None:
    """Raise RecipeError when the layout cannot hold what the recipe would make, before the long work."""
    chosen, linears = layout(name), checkpoint.config.all_linears()
    schemes = {linear: scheme for linear in linears if (scheme := recipe.scheme_for(linear))}
    for linear, scheme in schemes.items():
        if reason := chosen.supports(scheme):
            raise RecipeError(f"{linear} ({scheme.label}) does not fit the {name} layout: {reason}")
        chosen.specs(linear, linears[linear], scheme)
    chosen.config(schemes, list(linears))


def _calibration(checkpoint: Checkpoint, recipe: Recipe, settings: Settings, progress: Progress) -> Rows:
    samples = settings.samples or recipe.calibration.get("samples", 128)
    length = settings.sequence_length or recipe.calibration.get("sequence_length", 512)
    if length > checkpoint.config.max_position:
        raise InputError(f"--sequence-length {length}: the model has {checkpoint.config.max_position} positions")
    tokenizer = ModelTokenizer(checkpoint.folder)
    if settings.calibration == "self":
        return self_rows(checkpoint, tokenizer, samples, length, settings.seed, progress)
    documents = load_documents(settings.calibration)
    rows = calibration_rows(tokenizer, documents, samples, length, settings.seed)
    if max(int(ids.max()) for ids in rows.ids) >= checkpoint.config.vocab_size:
        raise InputError(f"{checkpoint.folder}: the tokenizer has more tokens than the model's vocabulary")
    if len(rows.ids) < samples:
        progress.log(f"calibration: the text gives {len(rows.ids)} rows of {length} tokens, {samples} were asked for")
    return rows


def _run(job: Job, target: QuantizedFolder, progress: Progress) -> tuple[list[dict[str, Any]], int]:
    """Solve the blocks that are not done yet; returns all blocks' results and how many were there."""
    blocks = target.resume()
    resumed = len(blocks)
    if not blocks:
        target.write_outer()
        if job.rows is not None:
            embed_rows(job)
    layers = job.checkpoint.config.num_layers
    with progress.bar(f"quantize {job.checkpoint.name} ({job.recipe.name})", layers) as tick:
        for layer in range(layers):
            if layer >= resumed:
                linears = solve_block(job, layer)
                target.write_block(layer, linears)
                blocks.append(_block_result(job.recipe, linears, progress))
                target.save_progress(blocks)
                forget_hidden(job, layer)
            tick()
    return blocks, resumed


def _block_result(recipe: Recipe, linears: Mapping[str, SolvedLinear], progress: Progress) -> dict[str, Any]:
    result = {}
    for name, linear in linears.items():
        scheme = linear.solved.tensor.scheme
        result[name] = {
            "method": recipe.method,
            "scheme": scheme.to_dict(),
            "error": linear.solved.error,
            "tokens": linear.tokens,
        }
        progress.log(f"{name}  {recipe.method} {scheme.label}  error {linear.solved.error:.3e}  {linear.tokens} tokens")
    return result


def _schemes(recipe: Recipe, blocks: list[dict[str, Any]]) -> dict[str, QuantScheme]:
    return {name: QuantScheme.from_dict(item["scheme"]) for block in blocks for name, item in block.items()}


def _manifest(
    checkpoint: Checkpoint, recipe: Recipe, rows: Rows | None, settings: Settings, blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    tensors = {name: item for block in blocks for name, item in block.items()}
    return {
        "source": {"name": checkpoint.name, "sha256": checkpoint.sha256},
        "recipe": recipe.to_dict(),
        "calibration": None
        if rows is None
        else {"sha256": rows.sha256, "rows": len(rows.ids), "tokens": rows.tokens, "domains": _counts(rows)},
        "seed": settings.seed,
        "layout": settings.layout,
        "versions": {"qwen3-export": __version__, "torch": torch.__version__.split("+")[0]},
        "policy": {
            "router": "16 bit",
            "norms": "16 bit",
            "embedding": "16 bit",
            "lm_head": "tied to the embedding" if checkpoint.config.tie_word_embeddings else "16 bit",
        },
        "experts": _experts(tensors),
        "tensors": tensors,
    }


def _counts(rows: Rows) -> dict[str, int]:
    return {domain: rows.domains.count(domain) for domain in sorted(set(rows.domains))}


def _experts(tensors: Mapping[str, Any]) -> dict[str, int] | None:
    """Fewest tokens that any expert saw, and how many experts' linears saw none."""
    tokens = [item["tokens"] for name, item in tensors.items() if ".experts." in name]
    return {"min_tokens": min(tokens), "below_floor": sum(count == 0 for count in tokens)} if tokens else None


def _result(output: Path, manifest: Mapping[str, Any], resumed: int, seconds: float) -> dict[str, Any]:
    written = open_checkpoint(output)
    return {
        "output": str(output),
        "recipe": manifest["recipe"]["name"],
        "source_sha256": manifest["source"]["sha256"],
        "calibration_sha256": (manifest["calibration"] or {}).get("sha256"),
        "seed": manifest["seed"],
        "tensors": len(manifest["tensors"]),
        "bits_per_weight": written.bits_per_weight,
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "resumed_blocks": resumed,
        "layers": [{"name": name, **item} for name, item in manifest["tensors"].items()],
        "experts": manifest["experts"],
    }
