"""The activations of all samples inside a block, stage after stage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from qwen3_export.model.block import State
from qwen3_export.model.workers import Parts, Workers
from qwen3_export.solve.calibration.activations import TOGETHER, SampleFile, SpareFiles, each


class BlockStates:
    """The state of every sample at the present stage of a block.

    There is one SampleFile per field; `files` are those it begins with, and `spare_files` lends and takes back
    the others.
    """

    def __init__(
        self,
        folder: Path,
        samples: int,
        files: dict[str, SampleFile] | None = None,
        spare_files: SpareFiles | None = None,
    ) -> None:
        self._folder, self.num_samples, self._spare = folder, samples, spare_files
        self._files: dict[str, SampleFile] = dict(files or {})
        self._generation, self._is_shared = 0, False

    def read(self, sample: int, fields: Collection[str] | None = None, count: int = 1) -> State:
        """State of one or several samples, batch axis included; all fields or some."""
        some = self._files if fields is None else [name for name in self._files if name in fields]
        return {name: self._files[name].read(sample, count) for name in some}

    def rows(self, name: str, sample: int, chosen: Tensor) -> Tensor:
        """Some rows of one field of one sample; see `SampleFile.rows`."""
        return self._files[name].rows(sample, chosen)

    def advance(
        self, step: Callable[[int, State], State], pool: Workers,
        idle: Collection[str] = (), lasting: Collection[str] = (), at_once: int = 1,
    ) -> None:  # fmt: skip
        """Replace every state by `step(sample, state)`.

        With `at_once`, `step` gets so many states, from that sample on.

        Unchanged fields are not written again, and those that are `idle` not even read. Those that are `lasting`
        will be kept as they then are.
        """
        self._generation += 1
        self._is_shared, is_done = pool.is_shared, False
        fresh: dict[str, SampleFile] = {}
        lock, names = threading.Lock(), {name for name in idle if name in self._files}

        def one(sample: int) -> None:
            count = min(at_once, self.num_samples - sample)
            before = self.read(sample, [name for name in self._files if name not in idle], count)
            after = step(sample, before)
            for name, tensor in after.items():
                if tensor is before.get(name):
                    continue
                with lock:
                    if name not in fresh:
                        fresh[name] = self._new(name, tensor[: len(tensor) // count], name in lasting)
                fresh[name].write(sample, tensor)
            names.update(after)

        def dump(samples: range) -> Parts:
            """What `load` needs to know of samples that are on the disk."""
            return {"names": sorted(names), "fresh": {name: file.form for name, file in fresh.items()}}

        def load(samples: range, parts: Parts) -> None:
            names.update(parts["names"])
            for name, (shape, dtype) in parts["fresh"].items():
                if name not in fresh:
                    like = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                    fresh[name] = self._new(name, like, name in lasting)

        size, count = at_once * max(1, TOGETHER // at_once), self.num_samples
        pieces = [range(begin, min(begin + size, count), at_once) for begin in range(0, count, size)]
        try:
            pool.share("advance", pieces, lambda some: each(pool, one, some), dump, load)
            self._meet(fresh.values(), pool)
            is_done = True
        finally:
            self._replace(fresh, names, is_done or not self._is_shared)

    def _meet(self, fresh: Collection[SampleFile], pool: Workers) -> None:
        """See what other workers have written.

        All have then read what will be written over.
        """
        for file in fresh if pool.is_shared else ():
            file.open_again()
        if self._spare is not None:
            pool.barrier()

    def _replace(self, fresh: dict[str, SampleFile], names: Collection[str], remove: bool) -> None:
        """Go on with the fresh files, and with those before of the other `names`."""
        kept = {name: file for name, file in self._files.items() if name in names and name not in fresh}
        for file in set(self._files.values()) - set(kept.values()):
            self._drop(file, remove)
        self._files = {**kept, **fresh}

    def _new(self, name: str, like: Tensor, lasting: bool) -> SampleFile:
        path = self._folder / f"{name}-{self._generation}.samples"
        if self._spare is not None:
            self._spare.find(path, self.num_samples * like.numel() * like.element_size())
        return SampleFile(path, tuple(like.shape), like.dtype, lasting)

    def _drop(self, file: SampleFile, remove: bool = True) -> None:
        file.close(remove=remove and self._spare is None)
        if remove and self._spare is not None and not file.lasting:
            self._spare.put(file.path)

    def take(self, name: str) -> SampleFile:
        """Hand one field's file over to the caller and drop the others."""
        taken = self._files.pop(name)
        self.close()
        return taken

    def close(self) -> None:
        """Delete all files."""
        for file in self._files.values():
            # Workers who share the files may need them yet: whoever gave them the work removes the folder.
            self._drop(file, not self._is_shared)
        self._files = {}
