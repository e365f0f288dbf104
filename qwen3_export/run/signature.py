"""The inputs and outputs of a decoder ONNX, whatever tool exported it.

    token ids   [batch, new]                       int64 or int32
    mask        [batch, past + new]                optional
    positions   [batch, new]                       optional
    past        [batch, heads, past, head_dim]     one or two a layer; each has its present among the outputs
    logits      [batch, new, vocab]

Known names are those of our folders, of onnxruntime-genai's builder (also as stated in `genai_config.json`) and of
optimum. A tensor with any other name is recognised by its type, rank and axis names. Raises InputError when a model is
not such a decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.onnx_header import OnnxHeader
from qwen3_export.errors import InputError, MissingRuntimeError

_HINT = "a decoder with a cache is wanted: token ids and past keys and values in, logits and present ones out"
_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
# Types by the name that headers have for them.
_ORT_NAMES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
_CACHE_TYPES = ("tensor(float)", "tensor(float16)", "tensor(int8)", "tensor(uint8)", "tensor(bfloat16)")
_IDS, _MASK, _POSITIONS = re.compile(r"input_?ids|^(ids|tokens|input)$"), re.compile("mask"), re.compile("position")
_LENGTH_AXIS = re.compile("seq|past|len|total|kv")
# Prefixes of past and present tensors, before layer and kind.
_PREFIX = re.compile(r"past_key_values?|present_key_values?|past|present|updated|new|cache|outputs?|inputs?")


class GraphValue(Protocol):
    """A graph input or output as ONNX Runtime describes it."""

    name: str
    type: str
    shape: Sequence[int | str | None]


@dataclass(frozen=True)
class Cache:
    """A past input and its present output.

    `shape` is the shape of an empty one, `axis` the axis that grows.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    axis: int
    dtype: Any


@dataclass(frozen=True)
class Signature:
    """Names and types of a decoder's inputs and outputs.

    `others` are inputs whose values follow from lengths alone. `named`: caches were matched by their names, not by
    their order alone.
    """

    ids: tuple[str, Any]
    mask: tuple[str, Any] | None
    positions: tuple[str, Any] | None
    caches: tuple[Cache, ...]
    logits: str
    vocab_size: int | None
    others: tuple[tuple[str, Any, int], ...] = ()
    named: bool = True

    def feeds(self, ids: NDArray, past: int) -> dict[str, NDArray]:
        """Every input but the caches, for new `ids` of one sequence after `past` tokens."""
        total = past + len(ids)
        values = {self.ids[0]: ids.astype(self.ids[1])[None]}
        if self.mask:
            values[self.mask[0]] = np.ones((1, total), self.mask[1])
        if self.positions:
            values[self.positions[0]] = np.arange(past, total, dtype=self.positions[1])[None]
        for name, dtype, rank in self.others:
            values[name] = _value(name, past, total).astype(dtype).reshape([-1] * rank)
        return values


def _value(name: str, past: int, total: int) -> NDArray:
    """The value of one of `_OTHERS`."""
    kind = next(kind for pattern, kind in _OTHERS if re.search(pattern, name))
    numbers = {"past": past, "total": total, "last": total - 1, "all": 0, "cached": past > 0}
    return np.arange(past, total) if kind == "range" else np.array([numbers[kind]])


# Inputs beside the usual ones: optimum's merged decoders, transformers' cache positions, what GroupQueryAttention
# counts, and how many positions get logits (0: all).
_OTHERS = (
    (r"use_cache", "cached"),
    (r"cache_position", "range"),
    (r"logits_to_keep", "all"),
    (r"past_seq(uence)?_len", "past"),
    (r"total_seq(uence)?_len", "total"),
    (r"seqlens?_k", "last"),
)


def read_signature(
    where: Path, inputs: Sequence[GraphValue], outputs: Sequence[GraphValue], config: Mapping[str, Any]
) -> Signature:
    """Find out what each input and output is.

    `config` is the decoder's part of a genai_config.json, or empty.
    """
    stated = {key: config.get(key, {}) if isinstance(config.get(key), dict) else {} for key in ("inputs", "outputs")}
    left = {item.name: item for item in inputs}
    ids = _take(left, stated["inputs"].get("input_ids"), _IDS, (2,), integers=True)
    if ids is None:
        raise InputError(f"{where}: no input of token ids among {_names(inputs)}", _HINT)
    if (isinstance(ids.shape[0], int) and ids.shape[0] != 1) or isinstance(ids.shape[1], int):
        raise InputError(
            f"{where}: {ids.name} has shape {list(ids.shape)}, one sequence of any length was expected",
            "export the model with dynamic axes for batch and sequence",
        )
    others = [left.pop(name) for name in list(left) if _is_other(left[name])]
    positions = _take(left, stated["inputs"].get("position_ids"), _POSITIONS, (2,), integers=True)
    mask = _take(left, stated["inputs"].get("attention_mask"), _MASK, (2,), integers=False)
    pasts = [item for item in left.values() if len(item.shape) >= 4 and item.type in _CACHE_TYPES]
    unknown = [item for item in left.values() if item not in pasts]
    if unknown:
        raise InputError(f"{where}: input {unknown[0].name} ({unknown[0].type}) is none that a decoder needs", _HINT)
    if not pasts:
        raise InputError(f"{where}: it has no past keys and values among its inputs {_names(inputs)}", _HINT)
    found = list(outputs)
    logits = _logits(where, found, stated["outputs"].get("logits"))
    found.remove(logits)
    pairs, named = _pairs(where, pasts, found)
    vocab = logits.shape[-1]
    return Signature(
        (ids.name, _TYPES[ids.type]),
        (mask.name, _TYPES[mask.type]) if mask else None,
        (positions.name, _TYPES[positions.type]) if positions else None,
        tuple(_cache(where, past, present.name, config) for past, present in pairs),
        logits.name,
        vocab if isinstance(vocab, int) else None,
        tuple((item.name, _TYPES[item.type], len(item.shape)) for item in others),
        named,
    )


@dataclass
class _Described:
    """A graph input or output as its header describes it."""

    name: str
    type: str
    shape: Sequence[int | str | None]


def why_no_decoder(where: Path, header: OnnxHeader) -> str | None:
    """Why `read_signature` refuses a graph, from its header alone; None when it does not."""
    inputs, outputs = (
        [_described(name, text) for name, text in values.items()] for values in (header.inputs, header.outputs)
    )
    try:
        read_signature(where, inputs, outputs, {})
    except InputError as error:
        return str(error).removeprefix(f"{where}: ")
    except MissingRuntimeError:
        return None
    return None


def _described(name: str, text: str) -> _Described:
    """From a header's text, such as `fp32 [batch_size, 2, 128]`."""
    kind, _, axes = text.partition(" [")
    shape = [int(axis) if axis.isdigit() else axis for axis in axes.rstrip("]").split(", ") if axis]
    return _Described(name, f"tensor({_ORT_NAMES.get(kind, kind)})", shape)


def _names(items: Sequence[GraphValue]) -> str:
    names = [item.name for item in items]
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "") or "none"


def _is_other(item: GraphValue) -> bool:
    known = any(re.search(pattern, item.name) for pattern, _ in _OTHERS)
    return known and len(item.shape) <= 1 and item.type in _TYPES


def _take(
    left: dict[str, GraphValue], stated: object, pattern: re.Pattern[str], ranks: tuple[int, ...], integers: bool
) -> GraphValue | None:
    """Take the stated input, or the first whose name, rank and type fit."""
    for item in left.values():
        fits = item.name == stated or (stated not in left and pattern.search(item.name.lower()))
        whole = item.type in ("tensor(int64)", "tensor(int32)")
        if fits and len(item.shape) in ranks and (whole or (not integers and item.type in _TYPES)):
            return left.pop(item.name)
    return None


def _logits(where: Path, outputs: Sequence[GraphValue], stated: object) -> GraphValue:
    floats = [item for item in outputs if len(item.shape) == 3 and "float" in item.type]
    for item in floats:
        if item.name == stated or item.name == "logits":
            return item
    named = [item for item in floats if "logit" in item.name.lower()]
    if len(named or floats) == 1:
        return (named or floats)[0]
    short = next((item for item in outputs if "logit" in item.name.lower()), None)
    if short is not None:
        raise InputError(
            f"{where}: {short.name} has shape {list(short.shape)}, [batch, sequence, vocabulary] was expected",
            "export the model with logits of every position",
        )
    raise InputError(f"{where}: no logits among its outputs {_names(outputs)}", _HINT)


def _place(name: str) -> tuple[str, str]:
    """Layer number and kind (`k`, `v` or none) in a cache's name."""
    rest = _PREFIX.sub("", name.lower())
    kind = re.search(r"(?<![a-z])(k|v|key|value)s?(?![a-z])", rest)
    return ".".join(re.findall(r"\d+", rest)), kind[1][0] if kind else ""


def _pairs(
    where: Path, pasts: Sequence[GraphValue], outputs: Sequence[GraphValue]
) -> tuple[list[tuple[GraphValue, GraphValue]], bool]:
    """Each past with its present, and whether names matched them.

    Otherwise it was their order.
    """
    presents = [item for item in outputs if len(item.shape) >= 4 and item.type in _CACHE_TYPES]
    places = {_place(item.name): item for item in presents}
    by_name = len(places) == len(presents) and {_place(item.name) for item in pasts} == set(places)
    if by_name:
        pairs = [(past, places[_place(past.name)]) for past in pasts]
    elif len(presents) == len(pasts):
        pairs = list(zip(pasts, presents, strict=True))
    else:
        raise InputError(f"{where}: {len(pasts)} past inputs, but {len(presents)} present outputs", _HINT)
    for past, present in pairs:
        if past.type != present.type or len(past.shape) != len(present.shape):
            raise InputError(f"{where}: {past.name} is {past.type}, {present.name} {present.type}", _HINT)
    return pairs, by_name


def _cache(where: Path, past: GraphValue, present: str, config: Mapping[str, Any]) -> Cache:
    """The empty cache: one sequence, no positions.

    The sizes of other symbolic axes must be stated by `config`.
    """
    if past.type not in _TYPES:
        raise MissingRuntimeError(f"{where}: a {past.type} cache cannot be fed to ONNX Runtime on this device")
    axes = [i for i, size in enumerate(past.shape) if not isinstance(size, int)]
    named = [i for i in axes if _LENGTH_AXIS.search(str(past.shape[i]).lower()) and "batch" not in str(past.shape[i])]
    likely = len(past.shape) - 2
    axis = named[0] if len(named) == 1 else likely if likely in axes else None
    if axis is None:
        raise InputError(f"{where}: {past.name} has shape {list(past.shape)}: no axis of it grows", _HINT)
    sizes = {likely - 1: config.get("num_key_value_heads"), len(past.shape) - 1: config.get("head_size")}
    shape = []
    for i, size in enumerate(past.shape):
        stated = 0 if i == axis else size if isinstance(size, int) else sizes.get(i) or 1
        shape.append(int(stated))
    return Cache(past.name, present, tuple(shape), axis, _TYPES[past.type])
