"""Records of a quantization run: manifest, coverage of experts, `--json` result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen3_export import __version__
from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.coverage import summarise, summary_of
from qwen3_export.core.manifest import MANIFEST, read_manifest, to_json
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import RecipeError
from qwen3_export.solve.job import LinearRecord, QuantizeSettings
from qwen3_export.text.documents import source_name
from qwen3_export.text.samples import Samples

# With a larger relative squared error a matrix is useless.
_LOST = 0.5


def record_linears(recipe: Recipe, linears: Mapping[str, LinearRecord], progress: Progress) -> dict[str, Any]:
    """One entry per linear for the manifest, and a line in the log.

    Raises RecipeError when a matrix's error is so large that its codes are useless.
    """
    result: dict[str, Any] = {}
    for name, linear in linears.items():
        scheme = linear.scheme
        _refuse_lost(name, linear)
        method = "rtn" if linear.fallback == "rtn" else recipe.method
        result[name] = {
            "method": method,
            "scheme": scheme.to_dict(),
            "error": linear.error,
            "tokens": linear.tokens,
        }
        if linear.fallback == "share":
            result[name]["calibrated_on"] = "shared"
        progress.log(f"{name}  {method} {scheme.label}  error {linear.error:.3e}  {linear.tokens} tokens")
    return result


def _refuse_lost(name: str, linear: LinearRecord) -> None:
    """Raise RecipeError when a matrix's error is so large that its codes are useless."""
    if linear.error > _LOST:
        raise RecipeError(
            f"{name}: as {linear.scheme.label} it loses {linear.error:.0%} of its outputs' power "
            f"(at most {_LOST:.0%} is written)",
            f"its weights are too small for the scales, or too uneven: leave it in 16 bits by a first rule "
            f"{{match: {name}, scheme: none}}, or give it more bits or smaller groups",
        )


def _tensors(found: Mapping[str, Any]) -> dict[str, Any]:
    """Every quantized matrix in the order of the model."""
    inner = {name: item for block in found["blocks"] for name, item in block["linears"].items()}
    ends = [{name: item for name, item in found["outer"].items() if name == module} for module in (EMBEDDING, HEAD)]
    return {**ends[0], **inner, **ends[1]}


def manifest_of(
    checkpoint: Checkpoint, recipe: Recipe, samples: Samples | None, settings: QuantizeSettings,
    found: Mapping[str, Any], libraries: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a finished folder.

    `found` are the records of blocks, embedding and head; `libraries` are those they were computed with.
    """
    return {
        "source": {"name": checkpoint.name, "sha256": checkpoint.sha256},
        "recipe": recipe.to_dict(),
        "calibration": None if samples is None else _calibration_record(recipe, samples, settings),
        "seed": settings.seed,
        "layout": settings.layout,
        "versions": {"qwen3-export": __version__, **{name: metadata.version(name).split("+")[0] for name in libraries}},
        "policy": {
            "router": "16 bit",
            "norms": "16 bit",
            "embedding": _policy(recipe.scheme_for(EMBEDDING)),
            "lm_head": "tied to the embedding"
            if checkpoint.config.tie_word_embeddings
            else _policy(recipe.scheme_for(HEAD)),
        },
        "experts": _experts(recipe, checkpoint.config.expert_width, found["blocks"]),
        "tensors": _tensors(found),
    }


def finished_run(
    output: Path, checkpoint: Checkpoint, recipe: Recipe, samples: Samples | None, settings: QuantizeSettings
) -> dict[str, Any] | None:
    """The manifest of a finished output that this very run would write, else None."""
    if not (output / MANIFEST).is_file():
        return None
    manifest = read_manifest(output)
    wanted = {
        "source": {"name": checkpoint.name, "sha256": checkpoint.sha256},
        "recipe": recipe.to_dict(),
        "calibration": None if samples is None else _calibration_record(recipe, samples, settings),
        "seed": settings.seed,
        "layout": settings.layout,
        "qwen3_export": __version__,
    }
    # As JSON gives them back, which knows no tuples.
    return manifest if all(manifest.get(key) == value for key, value in json.loads(to_json(wanted)).items()) else None


def _policy(scheme: QuantScheme | None) -> str:
    return "16 bit" if scheme is None else scheme.label


def _calibration_record(recipe: Recipe, samples: Samples, settings: QuantizeSettings) -> dict[str, Any]:
    """The record of the calibration text; a file without its path."""
    count, length = settings.size(recipe)
    return {
        "source": source_name(settings.calibration),
        "sha256": samples.sha256,
        "seed": settings.seed,
        "samples": count,
        "sequence_length": length,
        "rows": len(samples.ids),
        "tokens": samples.tokens,
        "domains": {domain: samples.domains.count(domain) for domain in sorted(set(samples.domains))},
        "documents": dict(samples.documents),
        **({"mapped": list(samples.mapped)} if samples.mapped else {}),
    }


def _experts(recipe: Recipe, width: int, blocks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Tokens of every expert by layer, and their summary.

    None for a model without experts.
    """
    tokens = {block_name(layer): block["expert_tokens"] for layer, block in enumerate(blocks) if block["expert_tokens"]}
    found = summarise(tokens, recipe.experts.token_floor(width), recipe.experts.fallback)
    return None if found is None else {**found, "tokens_per_expert": tokens}


def report_experts(experts: Mapping[str, Any] | None, progress: Progress) -> None:
    """Log how many tokens reached the experts, and warn where they were too few."""
    if experts is None:
        return
    total = sum(map(len, experts["tokens_per_expert"].values()))
    fewest, below, floor = experts["min_tokens"], experts["below_floor"], experts["floor"]
    progress.log(f"experts: {total}, each saw {fewest} calibration tokens or more; {below} fewer than {floor}")
    if below:
        done = {"share": "calibrated on their layer's tokens too", "rtn": "rounded without calibration"}
        progress.warn(
            f"{below} of {total} experts saw fewer than {floor} calibration tokens (the fewest {fewest}) and were "
            f"{done[experts['fallback']]}; more --samples or a wider text reaches them"
        )


def result_of(output: Path, manifest: Mapping[str, Any], resumed: int, seconds: float) -> dict[str, Any]:
    """The JSON object of a finished run."""
    written = open_checkpoint(output)
    return {
        "output": str(output),
        "recipe": manifest["recipe"]["name"],
        "source_sha256": manifest["source"]["sha256"],
        "calibration_sha256": (manifest["calibration"] or {}).get("sha256"),
        "seed": manifest["seed"],
        "tensors": len(manifest["tensors"]),
        "bits_per_weight": written.bits_per_weight,
        "linear_bits_per_weight": written.linear_bits_per_weight,
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "resumed_blocks": resumed,
        "layers": [{"name": name, **item} for name, item in manifest["tensors"].items()],
        "experts": summary_of(manifest["experts"]),
    }
