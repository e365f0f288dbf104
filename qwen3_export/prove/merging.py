"""Merges several reference files of one original.

So one file can hold more text than one run scores, or domains that were written on several machines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.outputs import staged_file
from qwen3_export.core.progress import peak_rss_bytes
from qwen3_export.core.tensorfile import Spec, TensorFile, TensorFileWriter
from qwen3_export.errors import InputError
from qwen3_export.prove.reference import ReferenceFile
from qwen3_export.text.samples import Samples

# Metadata that must be the same in all files.
_SAME = ("source_sha256", "vocab_size", "top_k", "format")
_PIECE = 256


def merge_references(paths: Sequence[Path], output: Path, force: bool = False) -> dict[str, Any]:
    """Write the rows of several reference files into one.

    Chats and tasks are those of the first file. Raises InputError when the files come from different originals or
    settings, or when two hold the same row.
    """
    files, readers = [TensorFile(path) for path in paths], [ReferenceFile(path) for path in paths]
    _check(paths, files, readers)
    domains = sorted({domain for reader in readers for domain in reader.samples.domains})
    samples = Samples(
        tuple(ids for reader in readers for ids in reader.samples.ids),
        tuple(domain for reader in readers for domain in reader.samples.domains),
    )
    heads = {
        name: np.concatenate([file.read(name) for file in files])
        for name in ("tokens", "row_lengths", "prompts", "prompt_lengths", "continuations")
    }
    heads["row_domains"] = np.array([domains.index(domain) for domain in samples.domains], np.int32)
    answers = [name for name in files[0].entries if name not in heads]
    specs: dict[str, Spec] = {name: (array.dtype, array.shape) for name, array in heads.items()}
    for name in answers:
        entries = [file.entries[name] for file in files]
        specs[name] = (entries[0].dtype, (sum(e.shape[0] for e in entries), *entries[0].shape[1:]))
    metadata = {**files[0].metadata, "domains": json.dumps(domains), "rows_sha256": samples.sha256}
    with staged_file(output, force, paths) as partial:
        with TensorFileWriter(partial, specs, metadata) as writer:
            for name, array in heads.items():
                writer.write(name, array)
            for name in answers:
                with writer.pieces(name) as write:
                    for piece in _pieces(files, name):
                        write(piece)
        ReferenceFile(partial)
    return {
        "output": str(output),
        "source_sha256": files[0].metadata["source_sha256"],
        "tokens": samples.tokens,
        "positions": samples.tokens - len(samples.ids),
        "rows": len(samples.ids),
        "domains": domains,
        "top_k": int(metadata["top_k"]),
        "bytes": output.stat().st_size,
        "sha256": sha256_file(output),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _pieces(files: Sequence[TensorFile], name: str) -> Iterable[NDArray]:
    """A tensor in pieces, since logits of a large vocabulary overflow the memory."""
    for file in files:
        count = file.entries[name].shape[0]
        for begin in range(0, count, _PIECE):
            yield file.rows(name, begin, min(begin + _PIECE, count))


def _check(paths: Sequence[Path], files: Sequence[TensorFile], readers: Sequence[ReferenceFile]) -> None:
    seen: dict[bytes, Path] = {}
    for path, file, reader in zip(paths, files, readers, strict=True):
        for key in _SAME:
            if file.metadata[key] != files[0].metadata[key]:
                raise InputError(
                    f"{path}: its {key} is {file.metadata[key]}, that of {paths[0]} {files[0].metadata[key]}",
                    "only references of one original, with the same --top-k, can be merged",
                )
        if reader.continuations.tokens.shape[1] != readers[0].continuations.tokens.shape[1]:
            raise InputError(f"{path}: its greedy texts have another length than those of {paths[0]}")
        for ids in reader.samples.ids:
            if ids.tobytes() in seen:
                raise InputError(f"{path}: a row of it is also in {seen[ids.tobytes()]}", "every row may count once")
            seen[ids.tobytes()] = path
