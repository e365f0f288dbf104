"""The original's answers on held-out text, live or in a portable file.

Reading the file needs no torch. It is one safetensors file, with P scored positions (all but the last of each row) and
the k most likely tokens of each:

    tokens        int32 [tokens]      rows one after another     row_lengths  int32 [rows]
    row_domains   int32 [rows]        indices into metadata["domains"]
    top_ids       int32 [P, k]        most likely first          top_logprobs fp32 [P, k]
    tail_logprob  fp32  [P]           of all other tokens together
    tail_ids      int32 [P, s]        some of those, drawn at random (`prove.tail`; version 1 has none)
    tail_logprobs fp32  [P, s]
    next_logprob  fp32  [P]           of the token that follows in the text
    prompt_lengths int32 [g], prompts int32 [sum], continuations int32 [g, n]   greedy text

Chats and their answers are JSON in the metadata (`generation.Chats`). With `top_k` 0, `logits` fp32 [P, vocab] replaces
the tensors from `top_ids` to `next_logprob`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.progress import Progress
from qwen3_export.core.tensorfile import Spec, TensorFile
from qwen3_export.errors import CheckpointError, InputError
from qwen3_export.prove.generation import Chats
from qwen3_export.prove.sidecars import Sidecars, parse_sidecars
from qwen3_export.prove.tail import draw_tail, tail_count
from qwen3_export.prove.tasks import Task, tasks_sha256
from qwen3_export.text.samples import Samples

FORMAT = "qwen3-export reference 2"
_READ = (FORMAT, "qwen3-export reference 1")


@dataclass(frozen=True)
class Truth:
    """The original's next-token distributions at the scored positions of one row.

    Either full: `logprobs` `[T, vocab]`, and `ids` is None. Or partial: `logprobs` `[T, k]` of the tokens `ids`
    `[T, k]`, most likely first, and `tail` `[T]`, the log-probability of all other tokens; `drawn_ids` and
    `drawn_logprobs` `[T, s]` are some of those others.
    """

    logprobs: NDArray[np.float32]
    next_logprob: NDArray[np.float32]
    ids: NDArray[np.int32] | None = None
    tail: NDArray[np.float32] | None = None
    drawn_ids: NDArray[np.int32] | None = None
    drawn_logprobs: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Continuations:
    """Greedy text of the original: prompts and the tokens that followed, `[g, n]`."""

    prompts: tuple[NDArray[np.int32], ...]
    tokens: NDArray[np.int32]


class Reference(Protocol):
    """The original's answers, which drift is measured against."""

    samples: Samples
    vocab_size: int
    is_lower_bound: bool
    source_sha256: str
    continuations: Continuations
    sidecars: Sidecars | None
    chats: Chats | None

    def tasks_right(self, tasks: Sequence[Task], progress: Progress | None = None) -> list[bool]:
        """Whether the original gets each task right."""

    def truth(self, row: int) -> Truth:
        """The original's answers on one row."""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis; the sum is taken in fp64."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)


class ReferenceFile:
    """A reference read from its file; CheckpointError when it is broken."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        metadata = self._file.metadata
        found = metadata.get("format", "")
        if found.startswith("qwen3-export reference ") and found not in _READ:
            raise CheckpointError(
                f"{path}: {found!r} was written by a later version, this one reads up to {FORMAT!r}",
                "update qwen3-export here",
            )
        if found not in _READ:
            raise CheckpointError(
                f"{path}: not a reference file of qwen3-export", "`qwen3-export reference` writes one"
            )
        drawn = found == FORMAT
        try:
            domains = json.loads(metadata["domains"])
            self.vocab_size, self.source_sha256 = int(metadata["vocab_size"]), metadata["source_sha256"]
            self.sidecars = parse_sidecars(metadata.get("sidecars"))
            self.samples = Samples(
                tuple(self._split("tokens", "row_lengths", shortest=2)),
                tuple(str(domains[i]) for i in self._integers("row_domains", len(domains))),
            )
            prompts = tuple(self._split("prompts", "prompt_lengths", shortest=1))
            texts = self._integers("continuations", self.vocab_size, axes=2)
            self.continuations = Continuations(prompts, texts)
            if len(self.samples.ids) != len(self.samples.domains) or len(prompts) != len(texts):
                raise ValueError("rows and domains, or prompts and continuations, are not as many")
            chats = json.loads(metadata.get("chats", "null"))
            self.chats = None if chats is None else Chats.from_dict(chats, self.vocab_size)
            self._tasks = json.loads(metadata.get("tasks", "null"))
            self._check_answers(int(metadata["top_k"]), drawn)
            self.is_lower_bound = not {"logits", "tail_ids"} & set(self._answers)
        except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged reference file ({error})") from error

    def _integers(self, name: str, limit: int, axes: int = 1) -> NDArray[np.int32]:
        """A small int32 tensor whose values are in `range(limit)`."""
        array = self._file.read(name)
        if array.dtype != np.int32 or array.ndim != axes or array.min(initial=0) < 0 or array.max(initial=0) >= limit:
            raise ValueError(f"{name} holds something else than {axes} axes of numbers below {limit}")
        return array

    def _split(self, name: str, lengths_name: str, shortest: int) -> list[NDArray[np.int32]]:
        """Token ids cut into rows."""
        flat, lengths = self._integers(name, self.vocab_size), self._integers(lengths_name, 2**31)
        if not len(lengths) or lengths.min() < shortest or lengths.sum(dtype=np.int64) != len(flat):
            raise ValueError(f"{lengths_name} do not cut {name} into rows")
        return np.split(flat, np.cumsum(lengths)[:-1])

    def _check_answers(self, top_k: int, drawn: bool) -> None:
        self._answers = answer_specs(sum(len(ids) - 1 for ids in self.samples.ids), top_k, self.vocab_size, drawn)
        for name, (dtype, shape) in self._answers.items():
            found = self._file.entries[name]
            if (found.dtype, found.shape) != (dtype, shape):
                raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}")

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum([len(ids) - 1 for ids in self.samples.ids])])

    def tasks_right(self, tasks: Sequence[Task], progress: Progress | None = None) -> list[bool]:
        """Whether the original got each task right when the file was written.

        Raises InputError when the file was written with other tasks.
        """
        known = self._tasks if isinstance(self._tasks, dict) else {}
        right = known.get("right")
        if known.get("sha256") != tasks_sha256(tasks) or not isinstance(right, list) or len(right) != len(tasks):
            raise InputError(
                f"{self._file.path}: it does not hold the original's answers to these tasks",
                "write it with `qwen3-export reference SOURCE --tasks FILE`, or validate against the original itself",
            )
        return [bool(value) for value in right]

    def truth(self, row: int) -> Truth:
        """The original's answers on one row."""
        begin, end = (int(i) for i in self._starts[row : row + 2])
        following = self.samples.ids[row][1:]
        answers = {name: self._file.rows(name, begin, end) for name in self._answers}
        if "logits" in answers:
            logprobs = log_softmax(answers["logits"])
            return Truth(logprobs, _pick(logprobs, following))
        for ids in (answers["top_ids"], answers.get("tail_ids")):
            if ids is not None and (ids.min(initial=0) < 0 or ids.max(initial=0) >= self.vocab_size):
                raise CheckpointError(f"{self._file.path}: row {row} names a token beyond the vocabulary")
        return partial_truth(answers)


def partial_truth(answers: Mapping[str, NDArray]) -> Truth:
    """The truth of one row, from the file's tensors by name."""
    return Truth(
        answers["top_logprobs"],
        answers["next_logprob"],
        answers["top_ids"],
        answers["tail_logprob"],
        answers.get("tail_ids"),
        answers.get("tail_logprobs"),
    )


def answer_specs(positions: int, top_k: int, vocab: int, drawn: bool = True) -> dict[str, Spec]:
    """`{tensor name: (dtype, shape)}` of the answers; `top_k` 0 means all logits.

    `drawn`: whether tokens drawn from the tail are kept, as from version 2 on.
    """
    single, index = np.dtype(np.float32), np.dtype(np.int32)
    if top_k == 0:
        return {"logits": (single, (positions, vocab))}
    k = min(top_k, vocab)
    specs: dict[str, Spec] = {
        "top_ids": (index, (positions, k)),
        "top_logprobs": (single, (positions, k)),
        "tail_logprob": (single, (positions,)),
        "next_logprob": (single, (positions,)),
    }
    count = tail_count(k, vocab) if drawn else 0
    if count:
        specs |= {"tail_ids": (index, (positions, count)), "tail_logprobs": (single, (positions, count))}
    return specs


def _pick(logprobs: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
    return np.take_along_axis(logprobs, ids[:, None].astype(np.int64), 1)[:, 0]


def full_truth(logits: NDArray[np.float32], ids: NDArray[np.int32]) -> Truth:
    """The truth of a row from its logits `[len(ids), vocab]`.

    The last position has no next token, so it is left out.
    """
    logprobs = log_softmax(logits[:-1])
    return Truth(logprobs, _pick(logprobs, ids[1:]))


def top_of(truth: Truth, k: int, row: NDArray[np.int32] | None = None) -> dict[str, NDArray]:
    """The partial form of a full truth, by the names of the file's tensors.

    The token ids `row` seed the draws from the tail; without them nothing is drawn.
    """
    k = min(k, truth.logprobs.shape[1])
    chosen = np.argpartition(-truth.logprobs, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(truth.logprobs, chosen, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    ids, top = np.take_along_axis(chosen, order, 1), np.take_along_axis(values, order, 1)
    rest = np.exp(truth.logprobs.astype(np.float64))
    np.put_along_axis(rest, ids, 0.0, 1)
    tail = np.log(np.maximum(rest.sum(-1), 1e-30)).astype(np.float32)
    parts = {
        "top_ids": ids.astype(np.int32),
        "top_logprobs": top,
        "tail_logprob": tail,
        "next_logprob": truth.next_logprob,
    }
    count = tail_count(k, truth.logprobs.shape[1])
    if row is not None and count:
        parts["tail_ids"], parts["tail_logprobs"] = draw_tail(truth.logprobs, parts["top_ids"], row, count)
    return parts


def file_metadata(values: Mapping[str, Any], domains: list[str]) -> dict[str, str]:
    """Metadata of a reference file: all values as text."""
    return {"format": FORMAT, "domains": json.dumps(domains), **{k: str(v) for k, v in values.items()}}
