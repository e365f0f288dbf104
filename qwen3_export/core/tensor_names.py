"""Checkpoints with other tensor names, or with many matrices in one tensor.

_orig_mod.model.layers…             torch.compile's wrapper; `module.` is that of distributed training
model.model.layers…                 saved from a wrapper of the whole model
layers.0.…, embed_tokens, norm      saved from the model without its head
…mlp.experts.gate_up_proj           [experts, 2 · intermediate, hidden]: transformers 5, frameworks of reinforcement
…mlp.experts.down_proj              [experts, hidden, intermediate]      learning

Nothing is copied: an expert is a range of bytes in its stack, and its entry points to that range.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.core.tensorfile import Entry, TensorFile
from qwen3_export.errors import CheckpointError

_BARE = ("layers.", "embed_tokens.", "norm.")
_STACK = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_HEADS = ("score.weight", "classifier.weight", "v_head.summary.weight", "value_head.weight")


def with_usual_names(folder: Path, files: Mapping[str, TensorFile], config: Qwen3Config) -> dict[str, TensorFile]:
    """`{Hugging Face's name: file}`, each file with its entries under these names.

    Raises CheckpointError when two tensors would get one name, or a stack of experts has another shape.
    """
    names = _renamed(folder, files)
    _refuse_other_heads(folder, names.values())
    parts: dict[TensorFile, dict[str, Entry]] = {}
    for stored, name in names.items():
        file = files[stored]
        found = dict(_cut(folder, name, file.entries[stored], config))
        parts.setdefault(file, {}).update(found)
    result: dict[str, TensorFile] = {}
    for file, entries in parts.items():
        view = file
        if entries.keys() != file.entries.keys():
            view = copy.copy(file)
            view.entries = entries
        result.update(dict.fromkeys(entries, view))
    return result


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds a PEFT adapter and no model."""
    if any((folder / name).is_file() for name in _ADAPTERS) and not any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder}: a PEFT adapter, which is no model by itself",
            "merge it into its base model: peft's merge_and_unload(), then save_pretrained(), and give that folder",
        )


def _renamed(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """`{stored name: usual name}`."""
    usual = {name: name.replace("_orig_mod.", "") for name in names}
    usual = {stored: name.removeprefix("module.") for stored, name in usual.items()}
    if any(name.startswith("model.model.") for name in usual.values()):
        usual = {stored: name.removeprefix("model.") for stored, name in usual.items()}
    if not any(name.startswith("model.") for name in usual.values()):
        usual = {s: f"model.{name}" if name.startswith(_BARE) else name for s, name in usual.items()}
    stored_as: dict[str, str] = {}
    for stored, name in usual.items():
        if name in stored_as:
            raise CheckpointError(f"{folder}: {stored} and {stored_as[name]} are both the tensor {name}")
        stored_as[name] = stored
    return usual


def _refuse_other_heads(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if name in _HEADS:
            raise CheckpointError(
                f"{folder}: {name} is the head of a classifier or reward model, which has no next token to predict",
                "give the language model that it was made from (Qwen3ForCausalLM, with lm_head)",
            )
        if ".lora_" in name:
            raise CheckpointError(
                f"{folder}: {name} belongs to a LoRA adapter that is not merged",
                "merge it: peft's merge_and_unload(), then save_pretrained(), and give that folder",
            )


def _cut(folder: Path, name: str, entry: Entry, config: Qwen3Config) -> Iterator[tuple[str, Entry]]:
    """The tensor itself, or the matrices of a stack of experts."""
    stack = _STACK.fullmatch(name)
    if stack is None:
        yield name, entry
        return
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    prefix, kind = stack.groups()
    linears = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    shape = (inner, hidden) if kind == "gate_up_proj" else (hidden, inner)
    wanted = (experts, len(linears) * shape[0], shape[1])
    if entry.shape != wanted:
        turned = entry.shape == (experts, wanted[2], wanted[1])
        raise CheckpointError(
            f"{folder}: tensor {name} has shape {list(entry.shape)}, {list(wanted)} was expected",
            "its matrices are transposed: load it where it was trained and save it with transformers 5"
            if turned
            else None,
        )
    size = math.prod(shape) * entry.dtype.itemsize
    for expert in range(experts):
        for place, linear in enumerate(linears):
            begin = entry.begin + (expert * len(linears) + place) * size
            yield f"{prefix}.{expert}.{linear}.weight", Entry(entry.dtype, shape, begin, begin + size)
