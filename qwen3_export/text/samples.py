"""Documents cut into samples of token ids, for calibration and for held-out text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.errors import InputError
from qwen3_export.text.documents import Document, document_ids, document_text, form_of
from qwen3_export.text.tokenizer import TextModel

_SHORTEST_WINDOW = 16


@dataclass(frozen=True)
class Samples:
    """Token sequences with their domains.

    `ids` are int32 `[tokens]`. `documents` counts the documents that they were cut from, by form (see `form_of`);
    `mapped` says which keys of a data set became which roles (see `Document`).
    """

    ids: tuple[NDArray[np.int32], ...]
    domains: tuple[str, ...]
    documents: Mapping[str, int] = field(default_factory=dict)
    mapped: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in total."""
        return sum(len(ids) for ids in self.ids)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all token ids and of the samples' lengths."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
        return digest.hexdigest()


def calibration_samples(tokenizer: TextModel, documents: list[Document], count: int, length: int, seed: int) -> Samples:
    """At most `count` samples of exactly `length` tokens, spread evenly over the domains.

    The documents of a domain are shuffled, joined and cut; samples are then taken from the domains in
    turn. Fewer come back when the text is too short; none at all is an InputError.
    """
    random = np.random.default_rng(seed)
    per_domain, forms = [], list[str]()
    for domain in sorted({document.domain for document in documents}):
        members = [document for document in documents if document.domain == domain]
        texts = [(document_text(tokenizer, members[i]), members[i]) for i in random.permutation(len(members))]
        pieces = [tokenizer.encode(text) for text, _ in texts]
        stream = np.concatenate(pieces)
        owners = np.repeat(np.arange(len(pieces)) + len(forms), [len(piece) for piece in pieces])
        forms += [form_of(text, not isinstance(document.content, str)) for text, document in texts]
        whole = len(stream) // length
        cut, owned = (values[: whole * length].reshape(whole, length) for values in (stream, owners))
        per_domain.append([(cut[i], domain, owned[i]) for i in random.permutation(whole)])
    chosen = [item for turn in _zip_longest(per_domain) for item in turn][:count]
    if not chosen:
        raise InputError(
            f"the calibration text has fewer than {length} tokens in every domain",
            "give more text, or a smaller --sequence-length",
        )
    ids, domains, owned_by = zip(*chosen, strict=True)
    counted = Counter(forms[i] for i in np.unique(np.concatenate(owned_by)))
    mapped = {document.mapped for document in documents} - {""}
    return Samples(ids, domains, dict(sorted(counted.items())), tuple(sorted(mapped)))


def _zip_longest(lists: list[list[Any]]) -> Iterator[list[Any]]:
    for turn in range(max(map(len, lists), default=0)):
        yield [items[turn] for items in lists if turn < len(items)]


def heldout_samples(tokenizer: TextModel, documents: list[Document], length: int) -> Samples:
    """Documents cut into windows of at most `length` tokens; shorter ones than 16 dropped."""
    ids, domains = [], []
    for document in documents:
        tokens = document_ids(tokenizer, document)
        for begin in range(0, len(tokens), length):
            window = tokens[begin : begin + length]
            if len(window) >= _SHORTEST_WINDOW:
                ids.append(window)
                domains.append(document.domain)
    if not ids:
        raise InputError("the held-out text has no window of 16 tokens", "give more text with --text")
    return Samples(tuple(ids), tuple(domains))


def subsample(samples: Samples, tokens: int | None) -> Samples:
    """About `tokens` tokens in whole samples, at least one, spread evenly.

    Samples differ in length, so the chosen ones can have more tokens than that, or fewer.
    """
    if tokens is None or samples.tokens <= tokens:
        return samples
    count = max(1, len(samples.ids) * tokens // samples.tokens)
    chosen = np.linspace(0, len(samples.ids) - 1, count).astype(int)
    return Samples(tuple(samples.ids[i] for i in chosen), tuple(samples.domains[i] for i in chosen))
