"""The model card of an artifact folder, its README.md.

Where the artifact comes from, what was measured, how to run it: written with the manifest, from the same values.
The measured table is put in by `validate --card`, between two comments; the rest is never touched again, so that
its owner may add to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
_BEGIN, _END = "<!-- qwen3-export: measured -->", "<!-- qwen3-export: end of measured -->"
_WHAT = {
    "quantized-checkpoint": ("a quantized Hugging Face folder", "transformers"),
    "onnx": ("an ONNX folder for ONNX Runtime and onnxruntime-genai", "onnxruntime"),
    "tensorrt": ("an ONNX and the TensorRT plan built from it", "tensorrt"),
    "triton": ("a model repository for Triton Inference Server", "triton"),
}
_RUN = {
    "quantized-checkpoint": (
        ("bash", 'qwen3-export run . --prompt "Hello"\nvllm serve .   # where its kernels take the scheme'),
        (
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")',
        ),
    ),
    "onnx": (
        ("bash", 'pip install "qwen3-export[ort]"\nqwen3-export run . --prompt "Hello"'),
        ("python", 'import onnxruntime_genai\n\nmodel = onnxruntime_genai.Model(".")'),
    ),
    "tensorrt": (
        (
            "bash",
            "qwen3-export bench .   # the plan on a device that engine.json names, elsewhere its ONNX\n"
            'qwen3-export run . --device plan --prompt "Hello"   # the plan, or an error',
        ),
    ),
}
_SERVE = """pip install {requirements}   # into the Python of the server's backend
tritonserver --model-repository=.

curl localhost:8000/v2/models/{model}/generate -d '{{"text_input": "Hello"}}'
curl localhost:8000/v2/models/{model}/generate_stream -d '{{"text_input": "Hello", "stream": true}}'"""


def write_card(folder: Path, kind: str, values: Mapping[str, Any]) -> None:
    """Write the card of a new artifact folder that holds a model."""
    if kind in _WHAT:
        (folder / CARD).write_text(card_text(kind, values), encoding="utf-8")


def card_text(kind: str, values: Mapping[str, Any]) -> str:
    """The card of one kind of artifact, from its manifest's values."""
    what, library = _WHAT[kind]
    source = values.get("source") or {}
    name = source.get("name", "Qwen3")
    lines = ["---", f"library_name: {library}", "---", "", f"# {name}: {what}", ""]
    lines += ["## Where it comes from", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in _provenance(values).items()]
    lines += ["", "`qwen3-export.json` says the same for programs."]
    if kind != "triton":
        lines += ["", "## What was measured", "", _BEGIN]
        lines += ["Nothing yet: `qwen3-export validate . --reference ORIGINAL --card` fills this in.", _END]
    lines += ["", "## How to run it", ""]
    for language, text in _RUN.get(kind) or (("bash", _SERVE.format(**values)),):
        lines += [f"```{language}", text, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _provenance(values: Mapping[str, Any]) -> dict[str, str]:
    """What a reader asks first, as far as the manifest knows."""
    source, recipe = values.get("source") or {}, values.get("recipe") or {}
    found = {"made by": "[qwen3-export](https://pypi.org/project/qwen3-export/)"}
    if source:
        found["original"] = f"{source.get('name')} (SHA-256 `{source.get('sha256')}`)"
    quantized = values.get("quantized")
    if isinstance(quantized, Mapping):
        found["quantized with"] = str(quantized.get("recipe"))
    if isinstance(recipe, Mapping) and recipe:
        found["quantized with"] = f"{recipe.get('name')}: {recipe.get('description')} (method {recipe.get('method')})"
    tensors = values.get("tensors")
    if isinstance(tensors, Mapping) and tensors:
        errors = [item["error"] for item in tensors.values() if isinstance(item, Mapping) and "error" in item]
        found["quantized tensors"] = f"{len(tensors)}, relative error at most {max(errors, default=0):.2e}"
    calibration = values.get("calibration")
    if isinstance(calibration, Mapping):
        found["calibration"] = ", ".join(f"{k} {v}" for k, v in calibration.items() if isinstance(v, str | int))
    for key in ("flavor", "precision", "engine", "compute_capabilities", "layout", "seed", "artifact", "backend"):
        if values.get(key) is not None:
            found[key.replace("_", " ")] = str(values[key])
    if "exact" in values:
        count = len(values.get("inexact_tensors") or ())
        found["numbers of the source"] = "all arrived unchanged" if values["exact"] else f"{count} tensors changed"
    return found


def update_card(folder: Path, result: Mapping[str, Any]) -> bool:
    """Put a validation's figures into a folder's card, if there is one."""
    path = folder / CARD
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        return False
    beside = folder / f".{CARD}.new"
    beside.write_text(f"{before}{begin}\n{measured(result)}\n{end}{after}", encoding="utf-8")
    os.replace(beside, path)
    return True


def measured(result: Mapping[str, Any]) -> str:
    """The measured table of one validation result."""
    low, high = result["kl_ci95"]
    bound = "at least " if result.get("kl_is_lower_bound") else ""
    rows = [
        ("runtime", f"{result['runtime']} {result['runtime_version']}, {result['device']}"),
        ("KL(original ‖ this), nats per token", f"{bound}{result['kl_mean']:.5f} (95 % {low:.5f} to {high:.5f})"),
        ("same most likely token", f"{100 * result['top1_agreement']:.2f} %"),
        ("perplexity, of the original's", f"{result['ppl_ratio']:.4f}"),
        ("positions", str(result["tokens"])),
        ("size", f"{result['bytes']} bytes"),
    ]
    rows += [
        (f"KL on {name}", f"{domain['kl_mean']:.5f} over {domain['tokens']} positions")
        for name, domain in result.get("domains", {}).items()
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
