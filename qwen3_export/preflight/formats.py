"""Whether each format can hold a recipe's result, and how large it would be.

Every format's own check and size calculation are used, on a checkpoint with the recipe's schemes and the original's
shapes. No weight is read.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.layouts import layout
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tokenizer_files import TOKENIZER, has_tokenizer
from qwen3_export.errors import ExportError, InputError

# Bytes of the manifest: for each quantized tensor, and for everything else.
_MANIFEST_BYTES, _TENSOR_BYTES, _INDEX_BYTES = 4 << 10, 460, 110


@dataclass(frozen=True)
class Verdict:
    """One format's answer.

    It says why it cannot hold the result (None: it can), the bytes it takes, and what to know. `build` is what a
    further step takes: `{peak_rss_bytes, seconds}`; `peak_rss_bytes` is the export's own peak memory.
    """

    reason: str | None = None
    bytes: int | None = None
    note: str | None = None
    build: dict[str, Any] | None = None
    peak_rss_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The contract's `{supported, reason, bytes}`; `note`, `build` and `peak_rss_bytes` where there are any."""
        values = {"supported": self.reason is None, "reason": self.reason, "bytes": self.bytes}
        more = {"note": self.note, "build": self.build, "peak_rss_bytes": self.peak_rss_bytes}
        return {**values, **{key: value for key, value in more.items() if value is not None}}


def as_quantized(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with a recipe's schemes, but without codes."""
    matrices = checkpoint.config.all_matrices()
    schemes = {name: scheme for name in matrices if (scheme := recipe.scheme_for(name))}
    return replace(checkpoint, schemes=schemes, quantization={}, reordered=frozenset())


def folder_of(layout_name: str) -> str:
    """The name of a layout's format."""
    return layout_name.replace("_", "-")


def _folder(name: str) -> Callable[[Checkpoint], Verdict]:
    """The check of a Hugging Face folder in one layout, with its size."""

    def check(quantized: Checkpoint) -> Verdict:
        chosen, shapes = layout(name), quantized.config.all_matrices()
        reasons = {scheme: chosen.supports(scheme) for scheme in set(quantized.schemes.values())}
        if reason := _first(quantized, lambda scheme: reasons[scheme]):
            return Verdict(reason)
        # Matrices of one shape and scheme are stored alike: bytes and number of their tensors.
        stored: dict[tuple[tuple[int, int], QuantScheme], tuple[int, int]] = {}
        total, count = 0, 0
        try:
            for module, scheme in quantized.schemes.items():
                kind = shapes[module], scheme
                if kind not in stored:
                    specs = chosen.specs(module, *kind).values()
                    stored[kind] = sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs), len(specs)
                total, count = total + stored[kind][0], count + stored[kind][1]
            chosen.config(dict(quantized.schemes), list(quantized.config.all_linears()))
        except InputError as error:
            return Verdict(str(error))
        for tensor in quantized.config.tensor_shapes():
            if tensor.removesuffix(".weight") not in quantized.schemes:
                entry = quantized.entry(tensor)
                total, count = total + entry.end - entry.begin, count + 1
        records = _MANIFEST_BYTES + _TENSOR_BYTES * len(quantized.schemes) + _INDEX_BYTES * count
        return Verdict(None, total + _sidecars(quantized) + records)

    return check


def _first(quantized: Checkpoint, supports: Callable[[QuantScheme], str | None]) -> str | None:
    """The reason of the first tensor that does not fit, with its name."""
    for module, scheme in quantized.schemes.items():
        if reason := supports(scheme):
            return f"{module} ({scheme.label}): {reason}"
    return None


def _sidecars(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in (*checkpoint.sidecars(), checkpoint.folder / "config.json"))


def _asked(module: str, extra: str, check: Callable[[Checkpoint], Verdict]) -> Callable[[Checkpoint], Verdict]:
    """A check that needs the library `module`; its errors become reasons."""

    def answer(quantized: Checkpoint) -> Verdict:
        if importlib.util.find_spec(module) is None:
            return Verdict(f"{module} is not installed here: pip install 'qwen3-export[{extra}]'")
        try:
            return check(quantized)
        except ExportError as error:
            return Verdict(str(error))

    return answer


def _onnx(flavor: str) -> Callable[[Checkpoint], Verdict]:
    def check(quantized: Checkpoint) -> Verdict:
        from qwen3_export.ship.onnx import check_request
        from qwen3_export.ship.onnx.size import planned_bytes

        check_request(quantized, flavor)
        return Verdict(None, planned_bytes(quantized))

    return check


def _gguf(quantized: Checkpoint) -> Verdict:
    from qwen3_export.ship.gguf import planned_bytes

    if not has_tokenizer(quantized.folder):
        return Verdict(f"a GGUF file holds the tokenizer, and {quantized.folder / TOKENIZER} is missing")
    return Verdict(None, planned_bytes(quantized))


def _tensorrt(quantized: Checkpoint) -> Verdict:
    from qwen3_export.ship.tensorrt import INSTALL, check_request, planned_bytes, planned_cost
    from qwen3_export.ship.tensorrt.plan_file import MODULES

    # The builder's memory is judged by `limits`.
    capabilities = check_request(quantized, "rtx", None, "fp16", onnx_only=True)
    hint = "" if importlib.util.find_spec(MODULES["rtx"]) else f"; to build it here: {INSTALL['rtx']}"
    cost = planned_cost(quantized)
    note = (
        f"building it takes about {cost.peak_rss_bytes / 1e9:.1f} GB of memory and {cost.seconds:.0f} s; it runs on "
        f"the compute capabilities it is built for ({', '.join(capabilities)} unless --sm says "
        f"otherwise), with the same TensorRT-RTX version, and is built anew for others{hint}"
    )
    return Verdict(None, planned_bytes(quantized), note, asdict(cost))


# What is written from the quantized folder, beside it.
EXPORTS: dict[str, Callable[[Checkpoint], Verdict]] = {
    "onnx": _asked("onnx_ir", "onnx", _onnx("ort")),
    "onnx-standard": _asked("onnx_ir", "onnx", _onnx("standard")),
    "gguf": _asked("gguf", "gguf", _gguf),
    "tensorrt": _asked("onnx_ir", "tensorrt", _tensorrt),
}
FORMATS: dict[str, Callable[[Checkpoint], Verdict]] = {
    "compressed-tensors": _folder("compressed-tensors"),
    "gptq": _folder("gptq"),
    "awq": _folder("awq"),
    "fp8": _folder("fp8"),
    "ggml": _folder("ggml"),
    **EXPORTS,
}


def formats_with(layout_name: str) -> dict[str, Callable[[Checkpoint], Verdict]]:
    """`FORMATS`, and the folder in a layout that is not among them."""
    name = folder_of(layout_name)
    return FORMATS if name in FORMATS else {**FORMATS, name: _folder(layout_name)}


def unsupported_tensors(quantized: Checkpoint, whole: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """The schemes that some format cannot hold.

    Each has the number of its tensors, one of their names, and the reasons by format. `whole` are the formats' verdicts
    on the checkpoint, which are those on its scheme where it has only one.
    """
    found, every_shape = [], quantized.config.all_matrices()
    for scheme in dict.fromkeys(quantized.schemes.values()):
        names = [name for name, other in quantized.schemes.items() if other == scheme]
        alone = replace(quantized, schemes=dict.fromkeys(names, scheme))
        is_whole = len(names) == len(quantized.schemes)
        verdicts = ((name, whole[name] if is_whole else check(alone)) for name, check in FORMATS.items())
        reasons = {name: verdict.reason for name, verdict in verdicts if verdict.reason}
        shapes = sorted({every_shape[name] for name in names})
        found.append(
            {
                "scheme": scheme.label,
                "count": len(names),
                "first": names[0],
                "shapes": [list(shape) for shape in shapes],
                "unsupported": reasons,
            }
        )
    return found
