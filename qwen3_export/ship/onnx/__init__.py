"""ONNX folders: `model.onnx`, its data, the tokenizer, and what onnxruntime-genai needs to run it.

Flavor `ort` is written in ONNX Runtime's fused operators, `standard` in ai.onnx operators alone.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.manifest import file_list, to_json, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.progress import Progress
from qwen3_export.core.tokenizer_files import (
    TOKENIZER,
    id_lookup,
    sampling_defaults,
    special_id,
    stop_ids,
    tokenizer_values,
)
from qwen3_export.errors import InputError
from qwen3_export.ship.exactness import cast_errors
from qwen3_export.ship.onnx import experts, ort_ops, standard_ops
from qwen3_export.ship.onnx.decoder import build_decoder
from qwen3_export.ship.onnx.graph import GraphBuilder
from qwen3_export.ship.result import check_schemes, exactness, export_result, provenance

# With shared buffers onnxruntime-genai allocates the whole cache for max_length before it starts.
_GENAI_LENGTH = 4096
FLAVORS = ("ort", "standard")
PRECISIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def export_onnx(
    checkpoint: Checkpoint,
    output: Path,
    flavor: str = "ort",
    precision: str = "fp32",
    accuracy_level: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an ONNX folder; codes and scales land unchanged. Returns the result that `--json` prints.

    Raises UnsupportedError, before anything is written, when a tensor's scheme does not fit.
    """
    started, progress = time.monotonic(), progress or Progress()
    check_request(checkpoint, flavor, precision)
    inexact = cast_errors(checkpoint, precision)
    with staged_folder(output, force, inputs=[checkpoint.folder]) as folder:
        sparse = write_graph(checkpoint, folder, flavor, precision, accuracy_level, progress)
        for path in checkpoint.sidecars():
            shutil.copyfile(path, folder / path.name)
        if checkpoint.folder.joinpath("vocab.json").is_file() and not (folder / TOKENIZER).exists():
            # onnxruntime-genai reads no other kind.
            (folder / TOKENIZER).write_text(to_json(tokenizer_values(checkpoint.folder)), encoding="utf-8")
        if flavor == "ort":
            config = genai_config(checkpoint)
            (folder / "genai_config.json").write_text(to_json(config), encoding="utf-8")
        values = {"flavor": flavor, "precision": precision, **provenance(checkpoint), **exactness(inexact), **sparse}
        write_manifest(folder, "onnx", values)
        files = file_list(folder)
    return {**export_result(output, files, checkpoint, inexact, started), **sparse}


def check_request(checkpoint: Checkpoint, flavor: str = "ort", precision: str = "fp32") -> None:
    """Everything that can be known before the long work; a recipe's target is checked by it too, before quantizing.

    Raises InputError for an unknown option, UnsupportedError for the first tensor that does not fit.
    """
    for value, choices, option in ((flavor, FLAVORS, "--flavor"), (precision, PRECISIONS, "--precision")):
        if value not in choices:
            raise InputError(f"{option} {value}: one of {', '.join(choices)} was expected")
    supports = ort_ops.supports if flavor == "ort" else standard_ops.supports
    check_schemes(checkpoint, supports, f"onnx ({flavor})", experts.supports)
    experts.sparse_layers(checkpoint)


def write_graph(
    checkpoint: Checkpoint, folder: Path, flavor: str, precision: str, accuracy_level: int | None, progress: Progress
) -> dict[str, Any]:
    """Write `model.onnx` and its data in one flavor; says which operators the experts became, where there are any."""
    dtype = PRECISIONS[precision]
    with GraphBuilder(folder, ort_ops.OPSET if flavor == "ort" else standard_ops.OPSET) as graph:
        ops = (
            ort_ops.OrtOps(graph, dtype, accuracy_level) if flavor == "ort" else standard_ops.StandardOps(graph, dtype)
        )
        build_decoder(ops, checkpoint, progress)
        graph.save({"qwen3_export.flavor": flavor, "qwen3_export.context": str(checkpoint.config.max_position)})
    return {"expert_layers": _expert_layers(ops, checkpoint, progress)} if checkpoint.config.sparse_layers else {}


def _expert_layers(
    ops: ort_ops.OrtOps | standard_ops.StandardOps, checkpoint: Checkpoint, progress: Progress
) -> list[dict[str, Any]]:
    found = experts.expressions(experts.sparse_layers(checkpoint), ops.not_fused)
    for item in found:
        if item["reason"] and isinstance(ops, ort_ops.OrtOps):
            progress.warn(
                f"experts of {len(item['layers'])} layers run as a slower {item['operator']}: {item['reason']}"
            )
    return found


def genai_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`genai_config.json` of a folder with our input and output names."""
    config, folder = checkpoint.config, checkpoint.folder
    stops = stop_ids(folder, id_lookup(folder))
    first_eos = stops[0] if stops else None
    bos, pad = special_id(folder, "bos"), special_id(folder, "pad")
    return {
        "model": {
            "type": "qwen3",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position,
            "bos_token_id": first_eos if bos is None else bos,
            "eos_token_id": stops if len(stops) > 1 else first_eos,
            "pad_token_id": first_eos if pad is None else pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": config.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": min(config.max_position, _GENAI_LENGTH),
            "past_present_share_buffer": True,
            **sampling_defaults(folder),
        },
    }
