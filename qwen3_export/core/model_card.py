"""The model card of an artifact folder, its README.md.

Where the artifact comes from, what was measured, how to run it: written with the manifest, from the same values.
The measured table is put in by `validate --card`, between two comments; the rest is never touched again, so that
its owner may add to it. GGUF files that lie in one folder share a card, which has a section for each.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_export.core.gguf_fallbacks import Fallbacks
from qwen3_export.errors import InputError, InputWarning

CARD = "README.md"
_STATED = (
    *("type", "flavor", "precision", "kv_cache", "engine", "compute_capabilities", "layout", "seed", "imatrix"),
    *("artifact", "backend"),
)
_BEGIN, _END = "<!-- qwen3-export: measured -->", "<!-- qwen3-export: end of measured -->"
_NOTHING = "Nothing yet: `qwen3-export validate {} --reference ORIGINAL --card` fills this in."
_WHAT = {
    "quantized-checkpoint": ("a quantized Hugging Face folder", "transformers"),
    "onnx": ("an ONNX folder for ONNX Runtime and onnxruntime-genai", "onnxruntime"),
    "onnx for web": ("an ONNX folder for transformers.js", "transformers.js"),
    "onnx of ai.onnx": ("an ONNX folder in operators of ai.onnx alone", "onnx"),
    "tensorrt": ("an ONNX and the TensorRT plan built from it", "tensorrt"),
    "onnx for tensorrt": ("an ONNX whose TensorRT plan is built on its device", "tensorrt"),
    "triton": ("a model repository for Triton Inference Server", "triton"),
}
_IN_ORT = ("bash", 'pip install "qwen3-export[ort]"\nqwen3-export run . --prompt "Hello"')
_RUN = {
    "quantized-checkpoint": (
        ("bash", 'qwen3-export run . --prompt "Hello"\nvllm serve .   # where its kernels take the scheme'),
        (
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")',
        ),
    ),
    "ggml": (
        (
            "bash",
            'qwen3-export run . --prompt "Hello"\nqwen3-export gguf . --output model.gguf   # for llama.cpp',
        ),
    ),
    "onnx": (
        _IN_ORT,
        ("python", 'import onnxruntime_genai\n\nmodel = onnxruntime_genai.Model(".")'),
    ),
    "onnx for web": (
        (
            "javascript",
            'import { env, pipeline } from "@huggingface/transformers";\n\n'
            "env.allowRemoteModels = false;\n"
            'env.localModelPath = "..";   // the folder that this one lies in\n'
            'const generate = await pipeline("text-generation", "NAME-OF-THIS-FOLDER");\n'
            'await generate([{ role: "user", content: "Hello" }], { max_new_tokens: 100 });',
        ),
        _IN_ORT,
    ),
    "onnx of ai.onnx": (_IN_ORT,),
    "tensorrt": (
        (
            "bash",
            "qwen3-export bench .   # the plan on a device that engine.json names, elsewhere its ONNX\n"
            'qwen3-export run . --device plan --prompt "Hello"   # the plan, or an error',
        ),
    ),
}
_BUILD = """# On the device, inside this folder:
{trtexec}
qwen3-export run . --device plan --prompt "Hello"   # the plan, or an error

qwen3-export run . --device cpu --prompt "Hello"   # anywhere: the ONNX in ONNX Runtime"""
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
    shown = _variant(kind, values)
    what, library = _WHAT.get(shown) or _WHAT[kind]
    source = values.get("source") or {}
    name = source.get("name", "Qwen3")
    lines = [*_front(library), "", f"# {name}: {what}", ""]
    lines += ["## Where it comes from", "", *_table(_provenance(values))]
    lines += ["", "`qwen3-export.json` says the same for programs."]
    if kind != "triton":
        lines += ["", "## What was measured", "", _BEGIN, _NOTHING.format("."), _END]
    lines += ["", "## How to run it", ""]
    filled = (_BUILD if "trtexec" in values else _SERVE) if shown not in _RUN else ""
    for language, text in _RUN.get(shown) or (("bash", filled.format(**values)),):
        lines += [f"```{language}", text, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _variant(kind: str, values: Mapping[str, Any]) -> str:
    """The kind of artifact as the card tells it, by what runs it."""
    if values.get("layout") == "ggml":
        return "ggml"
    if kind == "onnx" and values.get("target") == "web":
        return "onnx for web"
    if kind == "onnx" and values.get("flavor") == "standard":
        return "onnx of ai.onnx"
    return "onnx for tensorrt" if "trtexec" in values else kind


def _front(library: str) -> list[str]:
    return ["---", f"library_name: {library}", "pipeline_tag: text-generation", "---"]


def _table(values: Mapping[str, str]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in values.items())]


def check_gguf_card(file: Path) -> Path:
    """The card beside a GGUF file.

    Raises InputError when it is somebody else's, which is not touched.
    """
    card = file.absolute().parent / CARD
    if card.exists() and not _section("[^>]+").search(_read(card)):
        raise InputError(f"{card} exists, and is no card of GGUF files", "leave --card away, or choose another folder")
    return card


def write_gguf_card(file: Path, values: Mapping[str, Any]) -> Path:
    """Add or replace a GGUF file's section of the card beside it.

    Gives the card's path.
    """
    card, name = check_gguf_card(file), file.name
    source = (values.get("source") or {}).get("name", "Qwen3")
    lines = [f"<!-- qwen3-export: file {name} -->", f"## {name}", "", *_table(_provenance(values)), "", _BEGIN]
    lines += [_NOTHING.format(name), _END, "", "```bash", 'pip install "qwen3-export[llamacpp]"']
    lines += [f'qwen3-export run {name} --prompt "Hello"', f"llama-cli --model {name}", "```", ""]
    section = "\n".join([*lines, f"<!-- qwen3-export: end of file {name} -->"])
    head = "\n".join([*_front("gguf"), "", f"# {source}: GGUF for llama.cpp", ""])
    text = _read(card) if card.exists() else head
    known = _section(re.escape(name)).search(text)
    before, after = (text[: known.start()], text[known.end() :]) if known else (f"{text.rstrip()}\n\n", "\n")
    _replace(card, f"{before}{section}{after}")
    return card


def _section(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- qwen3-export: file ({name}) -->.*?<!-- qwen3-export: end of file \1 -->", re.DOTALL)


def _read(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{card}: cannot be read ({error})") from error


def _replace(card: Path, text: str) -> None:
    # A name of its own, made exclusively: no link is followed, and nobody else's file is in the way.
    beside = card.with_name(f".{CARD}.{uuid.uuid4().hex[:8]}.new")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, card)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _provenance(values: Mapping[str, Any]) -> dict[str, str]:
    """What a reader asks first, as far as the manifest knows."""
    source, recipe = values.get("source") or {}, values.get("recipe") or {}
    found = {"made by": "[qwen3-export](https://pypi.org/project/qwen3-export/)"}
    if source:
        found["original"] = f"{source.get('name')} (SHA-256 `{source.get('sha256')}`)"
    if "artifact_sha256" in values:
        found["SHA-256 of the artifact"] = f"`{values['artifact_sha256']}`"
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
    for key in _STATED:
        if values.get(key) not in (None, []):
            value = values[key]
            found[key.replace("_", " ")] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    found |= Fallbacks.of(values).summary()
    if values.get("accuracy_level") is not None:
        found["accuracy level"] = _level(values)
    if "exact" in values:
        count = len(values.get("inexact_tensors") or ())
        changed = f"{count} tensor{'' if count == 1 else 's'} changed"
        found["numbers of the source"] = "all arrived unchanged" if values["exact"] else changed
    return found


def _level(values: Mapping[str, Any]) -> str:
    """What MatMulNBits does with activations, and what it costs."""
    if values["accuracy_level"] == 0:
        return "0, activations as they are"
    cost = values.get("added_kl")
    added = "" if cost is None else f", which adds a KL of {cost:.1e}"
    return f"{values['accuracy_level']}: activations are rounded to 8 bits{added}"


def update_cards(result: Mapping[str, Any]) -> list[str]:
    """Write a validation's figures into its artifacts' cards; the artifacts that have one."""
    return [item["artifact"] for item in result["results"] if update_card(Path(item["artifact"]), item)]


def update_card(artifact: Path, result: Mapping[str, Any]) -> bool:
    """Put a validation's figures into a card, if there is one.

    It is the folder's, or the GGUF file's section of the one beside it. Where it cannot be written there is a warning:
    the figures are there without it.
    """
    single = artifact.is_file()
    path = artifact.absolute().parent / CARD if single else artifact / CARD
    if not path.is_file():
        return False
    try:
        return _put_in(path, artifact.name if single else None, measured(result))
    except (OSError, InputError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        warnings.warn(f"{path}: the figures cannot be put in ({reason})", InputWarning, stacklevel=2)
        return False


def _put_in(card: Path, section_of: str | None, figures: str) -> bool:
    """Write figures into a card, or into its section of a GGUF file."""
    text = _read(card)
    section = _section(re.escape(section_of)).search(text) if section_of else None
    if section_of and section is None:
        return False
    begin, end = section.span() if section else (0, len(text))
    before, opening, rest = text[begin:end].partition(_BEGIN)
    _, closing, after = rest.partition(_END)
    if not opening or not closing:
        return False
    _replace(card, f"{text[:begin]}{before}{opening}\n{figures}\n{closing}{after}{text[end:]}")
    return True


def measured(result: Mapping[str, Any]) -> str:
    """The measured table of one validation result."""
    low, high = result["kl_ci95"]
    bound = "at least " if result.get("kl_is_lower_bound") else "about " if result.get("kl_estimate") else ""
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
