"""GGUF metadata of a Qwen3 model, as llama.cpp's converter orders it.

general.* · qwen3.* (or qwen3moe.*) · tokenizer.*        Keys: the GGUF specification, and gguf-py.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.disk import naming_full
from qwen3_export.core.files import read_sidecar, read_text
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.rope import Rope
from qwen3_export.core.tokenizer_files import added_token_flags, chat_templates, stop_ids, tokenizer_values
from qwen3_export.errors import CheckpointError, UnsupportedError

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_ROLES = ("bos", "eos", "pad")
# Tokens that llama.cpp recognises by their text as ends of an answer, and the keys for further ones beside eos.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>", "_<EOT>")
_MORE_ENDS = ("eot", "eom")
ARCHITECTURES = {"qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


def check_architecture(config: Qwen3Config) -> None:
    """Raise UnsupportedError for an architecture that llama.cpp cannot load."""
    everywhere = len(config.sparse_layers) == config.num_layers and config.norm_topk_prob
    if config.model_type == "qwen3_moe" and not everywhere:
        raise UnsupportedError(
            "llama.cpp's qwen3moe has experts in every layer and normalises their weights; this model does not",
            "run the Hugging Face folder instead",
        )
    rope = config.rope
    if rope.kind == "yarn" and (rope.beta_fast, rope.beta_slow, rope.truncate) != (32.0, 1.0, True):
        raise UnsupportedError(
            f"YaRN with beta_fast {rope.beta_fast:g} and beta_slow {rope.beta_slow:g} cannot be written to a GGUF",
            "llama.cpp takes 32 and 1",
        )


def add_metadata(writer: gguf.GGUFWriter, checkpoint: Checkpoint, file_type: int) -> None:
    """Add all keys that llama.cpp's converter writes."""
    config = checkpoint.config
    writer.add_type("model")
    _general(writer, checkpoint)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    _rope(writer, config.rope)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(file_type)
    if config.num_experts:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _tokenizer(writer, checkpoint)


def size_label(config: Qwen3Config) -> str:
    """A model's size in llama.cpp's notation: `8.0M`, or `8x4.8M` with experts."""
    if not config.num_experts:
        return _rounded(config.num_parameters)
    expert = 3 * config.hidden_size * config.moe_intermediate_size * len(config.sparse_layers)
    return f"{config.num_experts}x{_rounded(config.num_parameters - (config.num_experts - 1) * expert)}"


def _rounded(count: int) -> str:
    scale, unit = next((pair for pair in _UNITS if count >= pair[0]), _UNITS[-1])
    number = count / scale
    return f"{number:.1f}{unit}" if len(str(round(number))) < 2 else f"{number:.0f}{unit}"


def _general(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Sampling defaults, name and origin, as gguf-py finds them.

    Its sources are `generation_config.json`, the folder's name and the front matter of README.md.
    """
    with tempfile.TemporaryDirectory() as place:
        copied = _plain_texts(checkpoint.folder, Path(place))
        try:
            found = gguf.Metadata.load(None, copied, None, checkpoint.config.num_parameters)
        except MemoryError:
            raise
        except Exception as error:  # gguf-py's heuristics over other people's YAML can raise anything
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{checkpoint.folder}: README.md has broken front matter ({first})") from error
    _check_sampling(checkpoint, vars(found))
    found.name = found.name or checkpoint.name
    found.size_label = found.size_label or size_label(checkpoint.config)
    found.set_gguf_meta_model(writer)


def _check_sampling(checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a sampling default that does not fit into 32 bits."""
    for key, value in values.items():
        most = 2**31 if isinstance(value, int) else 3e38
        if key.startswith("sampling_") and isinstance(value, int | float) and not -most <= value < most:
            name = key.removeprefix("sampling_")
            raise CheckpointError(
                f"{checkpoint.folder / 'generation_config.json'}: {name} is {value}, a number of 32 bits was expected",
                "mend it, or take it out",
            )


def _plain_texts(folder: Path, place: Path) -> Path:
    """Copies of the texts that gguf-py reads, in a folder of the same name.

    The copies are plain UTF-8, since gguf-py knows neither byte-order marks nor UTF-16.
    """
    folder = folder.absolute()
    copied = place / folder.parent.name / folder.name
    copied.mkdir(parents=True)
    with naming_full(copied):
        for name in ("config.json", "generation_config.json"):
            (copied / name).write_text(json.dumps(read_sidecar(folder / name)), encoding="utf-8")
        if (folder / "README.md").is_file():
            text = read_text(folder / "README.md", CheckpointError)
            (copied / "README.md").write_text(text, encoding="utf-8")
    return copied


def _rope(writer: gguf.GGUFWriter, rope: Rope) -> None:
    if rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
        usual = 0.1 * math.log(rope.factor) + 1.0
        if not math.isclose(rope.attention_factor, usual):
            # llama.cpp applies its own factor; it never reads the key `yarn_attn_factor` that its converter writes.
            writer.add_rope_scaling_attn_factors(rope.attention_factor / usual)
    writer.add_rope_freq_base(rope.theta)


def _tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Byte-level BPE as Qwen uses it: tokens, types, merges, special ids, template."""
    folder, size = checkpoint.folder, checkpoint.config.vocab_size
    tokenizer, config = tokenizer_values(folder), read_sidecar(folder / "tokenizer_config.json")
    model, added = tokenizer.get("model", {}), tokenizer.get("added_tokens") or []
    _check_tokenizer(folder / "tokenizer.json", model, added, size)
    tokens, types = _vocabulary(model["vocab"], added, config, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    ids = {token: index for index, token in enumerate(tokens)}
    found = _special_ids(ids, config, checkpoint.raw_config)
    for role, index in {**found, **_stop_roles(tokens, found, stop_ids(folder, ids.get))}.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(bool(config.get("add_bos_token", False)))
    processor = tokenizer.get("post_processor") or {}
    if any(item.get("type") == "ByteLevel" for item in processor.get("processors", [processor])):
        writer.add_add_eos_token(False)
    templates = chat_templates(folder)
    if list(templates) == ["default"]:
        writer.add_chat_template(templates["default"])
    elif templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def _check_tokenizer(path: Path, model: Any, added: Any, size: int) -> None:
    """Raise CheckpointError when `tokenizer.json` has an unexpected form."""
    parts = {"vocab": dict, "merges": list}
    whole = isinstance(model, dict) and all(isinstance(model.get(key), kind) for key, kind in parts.items())
    listed = isinstance(added, list) and all(
        isinstance(item, dict) and isinstance(item.get("content"), str) for item in added
    )
    if not whole or not listed or model.get("type") != "BPE":
        raise CheckpointError(f"{path}: a byte-level BPE tokenizer was expected")
    for index in (*model["vocab"].values(), *(item.get("id") for item in added)):
        if type(index) is not int or not 0 <= index < size:
            raise CheckpointError(f"{path}: it has token {index}, the model's vocabulary {size} tokens")


def _stop_roles(tokens: list[str], found: Mapping[str, int], stops: list[int]) -> dict[str, int]:
    """Roles for tokens that end an answer.

    Tokens that llama.cpp recognises by their text need none. Without an eos, llama.cpp would use token 11. Raises
    UnsupportedError when there are more such tokens than roles.
    """
    roles = {"eos": stops[0]} if stops and "eos" not in found else {}
    known = {found.get("eos"), roles.get("eos")}
    left = [index for index in stops if index not in known and tokens[index] not in _ENDS]
    if len(left) > len(_MORE_ENDS):
        named = ", ".join(tokens[index] for index in left)
        raise UnsupportedError(
            f"a GGUF file has no place for so many tokens that end an answer: {named}",
            f"name at most {len(_MORE_ENDS)} of them beside eos in generation_config.json",
        )
    return {**roles, **dict(zip(_MORE_ENDS, left, strict=False))}


def _special_ids(ids: Mapping[str, int], tokenizer: dict[str, Any], model: Mapping[str, Any]) -> dict[str, int]:
    """Ids by role, from the tokenizer's settings, then from `config.json`."""
    found: dict[str, int] = {}
    for role in _ROLES:
        token = tokenizer.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[role] = ids[token]
    for role in _ROLES:
        index = model.get(f"{role}_token_id")
        if type(index) is int and 0 <= index < model["vocab_size"]:
            found.setdefault(role, index)
    return found


def _vocabulary(
    vocab: dict[str, int], added: list[dict[str, Any]], config: dict[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Tokens and types by id.

    Qwen's embedding tables have more rows than there are tokens; these ids become unused padding.
    """
    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(gguf.TokenType.UNUSED)] * size
    for token, index in vocab.items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    overruling = added_token_flags(config)
    for item in added:
        text, index = item["content"], item["id"]
        special = overruling.get(index, bool(item.get("special", False)))
        control = special or (text.startswith("<|") and text.endswith("|>"))
        tokens[index] = text
        types[index] = int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    return tokens, types
