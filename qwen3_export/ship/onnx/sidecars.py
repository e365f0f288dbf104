"""The JSON files beside an ONNX graph: `config.json` and onnxruntime-genai's `genai_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.tokenizer_files import id_lookup, sampling_defaults, special_id, stop_ids
from qwen3_export.ship.onnx import w8a8
from qwen3_export.ship.onnx.target import Files, Target, web_dtype

# With shared buffers onnxruntime-genai allocates the whole cache for max_length before it starts.
_GENAI_LENGTH = 4096
# Begin and end of a tool call and of reasoning, as onnxruntime-genai's own builder looks them up.
_MARKS = {
    "bot_token_id": "<tool_call>",
    "eot_token_id": "</tool_call>",
    "bor_token_id": "<think>",
    "eor_token_id": "</think>",
}


def model_config(checkpoint: Checkpoint, target: Target, files: Files, shards: int) -> dict[str, Any]:
    """`config.json` of an unquantized model.

    How the weights are stored is the graph's own matter.

    For transformers.js it also names the type of the weights, that of the cache, and how many data files there are.
    """
    values = {key: value for key, value in checkpoint.raw_config.items() if key != "quantization_config"}
    if target.is_web:
        dtype = web_dtype(checkpoint, target.precision)
        values["transformers.js_config"] = {
            "dtype": dtype,
            "kv_cache_dtype": {dtype: "float16" if target.precision == "fp16" else "float32"},
            "use_external_data_format": {Path(files.model).name: shards},
        }
    return values


def context_length(config: Qwen3Config) -> int:
    """Positions that a model is made for; YaRN stretches its original ones."""
    rope = config.rope
    return max(config.max_position, int(rope.factor * rope.original_max_position))


def genai_config(checkpoint: Checkpoint, target: Target, files: Files, shares_cache: bool = True) -> dict[str, Any]:
    """`genai_config.json` of a folder with our input and output names."""
    config = checkpoint.config
    provider: list[dict[str, Any]] = [{target.provider: {}}] if target.provider else []
    return {
        "model": {
            "type": "qwen3",
            "vocab_size": config.vocab_size,
            "context_length": context_length(config),
            **_special_ids(checkpoint.folder),
            "decoder": {
                "filename": files.model,
                "session_options": {**_session(checkpoint), "provider_options": provider},
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
            "max_length": min(context_length(config), _GENAI_LENGTH),
            "past_present_share_buffer": shares_cache,
            **sampling_defaults(checkpoint.folder),
        },
    }


def _special_ids(folder: Path) -> dict[str, Any]:
    """Ids of begin, end, padding, and of tool and reasoning marks.

    Those that the tokenizer lacks are left out.
    """
    id_of = id_lookup(folder)
    stops = stop_ids(folder, id_of)
    first = stops[0] if stops else None
    bos, pad = special_id(folder, "bos"), special_id(folder, "pad")
    ids = {
        "bos_token_id": first if bos is None else bos,
        "eos_token_id": stops if len(stops) > 1 else first,
        "pad_token_id": first if pad is None else pad,
    }
    marks = {name: id_of(mark) for name, mark in _MARKS.items()}
    return ids | {name: found for name, found in marks.items() if found is not None}


def _session(checkpoint: Checkpoint) -> dict[str, str]:
    """What ONNX Runtime must be told for this model."""
    return w8a8.SESSION if any(w8a8.fits(scheme) for scheme in checkpoint.schemes.values()) else {}
