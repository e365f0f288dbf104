"""A TensorRT plan on its GPU: buffers stay there, logits come back.

    past_key_values.N.key    buffer A ─┐                    ┌─▶ buffer B   present.N.key
    input_ids, positions, mask ────────┴─ one step ─────────┴─▶ logits ─▶ this machine's memory

The graph appends to its cache by writing a longer one, so every cache has two buffers, which change places after each
step. A profile is a range of shapes; one that is made for decoding is taken when one token comes. A prompt that is
longer than the largest profile goes in pieces.

Imports neither torch nor CUDA packages: `core.cuda` speaks to the driver, TensorRT to the rest.
TensorRT's Python API: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/_static/python-api
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.cuda import CudaError
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.run.plan_engine import IDS, LOGITS, MASK, POSITIONS, PlanEngine, PlanProfile, Shape, present_of
from qwen3_export.run.plan_files import load_runtime, read_plan
from qwen3_export.run.session import RuntimeOptions, check_ids

_SMALLEST_CACHE = 256


class PlanSession:
    """See `run.session.Session`.

    Raises MissingRuntimeError where GPU, driver, library or version are not those of engine.json, and where the driver
    fails; ResourceError where the GPU's memory is full.
    """

    threads = 1

    def __init__(self, folder: Path, options: RuntimeOptions) -> None:
        files = read_plan(folder)
        self._folder = folder
        self._gpu, trt = load_runtime(files)
        self.runtime, self.version = files.runtime, str(trt.__version__)
        self.device = f"cuda ({self._gpu.name}, {self._gpu.capability})"
        self._length = self._capacity = 0
        # Address and size by the tensor's name; address 0 where there is none yet.
        self._buffers: dict[str, tuple[int, int]] = {}
        self._profiles: list[PlanProfile] = []
        try:
            before = self._gpu.free_bytes()
            self._engine = PlanEngine(trt, files)
            self._profiles = self._engine.profiles(self._gpu.stream)
            self._gpu.synchronize()
            self.vocab_size = self._engine.vocab_size
            self.context = min(profile.context_length for profile in self._profiles)
            self._most_tokens = max(profile.most_tokens for profile in self._profiles)
            self._grow(min(options.context or _SMALLEST_CACHE, self.context))
            self.device_memory_bytes = before - self._gpu.free_bytes()
        except BaseException:
            self.close()
            raise

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Start a new sequence; logits `[len(ids), vocab]`."""
        self._length = 0
        check_ids(self, self._folder, ids, 0)
        pieces = [ids[at : at + self._most_tokens] for at in range(0, len(ids), self._most_tokens)]
        found = [self._run(piece) for piece in pieces]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits `[vocab]`."""
        ids = np.array([token], np.int32)
        check_ids(self, self._folder, ids, self._length)
        return self._run(ids)[0]

    def _run(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """One step: the cache grows by `ids`."""
        try:
            self._gpu.activate()
            self._engine.log.errors.clear()
            logits = self._step(ids)
        except CudaError as error:
            raise MissingRuntimeError(f"{self._folder}: {error}", error.hint) from error
        for name in self._engine.pasts:
            self._change_places(name)
        self._length += len(ids)
        return logits

    def _step(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        past, total = self._length, self._length + len(ids)
        if total > self._capacity:
            self._grow(total)
        feeds = {
            IDS: ids.astype(np.int64)[None],
            MASK: np.ones((1, total), np.int64),
            POSITIONS: np.arange(past, total, dtype=np.int64)[None],
        }
        for name, values in feeds.items():
            self._gpu.upload(self._buffer(name, values.nbytes), values)
        logits = np.empty((len(ids), self.vocab_size), np.float32)
        self._buffer(LOGITS, logits.nbytes)
        shapes = {name: values.shape for name, values in feeds.items()}
        shapes |= {name: self._cache_shape(name, past) for name in self._engine.pasts}
        context = self._profile_of(shapes).context
        self._bind(context, shapes)
        if not context.execute_async_v3(self._gpu.stream):
            raise self._engine.failure("cannot run it")
        self._gpu.download(self._buffers[LOGITS][0], logits)
        return logits

    def _profile_of(self, shapes: Mapping[str, Shape]) -> PlanProfile:
        for profile in self._profiles:
            if profile.fits(shapes):
                return profile
        asked = ", ".join(f"{name} {'x'.join(map(str, shapes[name]))}" for name in (IDS, MASK))
        raise InputError(
            f"{self._folder}: no profile of the plan takes {asked}",
            "build it with a larger --max-prompt or --max-context",
        )

    def _bind(self, context: Any, shapes: Mapping[str, Shape]) -> None:
        """Shapes of every input, addresses of every tensor."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._engine.failure(f"refuses {name} {list(shape)}")
        for name in self._engine.names:
            if not context.set_tensor_address(name, self._buffers[name][0]):
                raise self._engine.failure(f"refuses the address of {name}")

    def _buffer(self, name: str, count: int) -> int:
        """A buffer that is kept, and replaced when it is too small."""
        address, size = self._buffers.get(name, (0, 0))
        if size < count:
            self._buffers.pop(name, None)
            if address:
                self._gpu.release(address)
            address = self._gpu.allocate(count)
            self._buffers[name] = (address, count)
        return address

    def _grow(self, positions: int) -> None:
        """Room for so many positions in every cache; what is there is kept."""
        capacity = min(max(positions, 2 * self._capacity), self.context)
        for name in self._engine.pasts:
            _, heads, _, width = self._cache_shape(name, 0)
            row = self._engine.item_bytes(name) * heads * width
            larger = self._buffer(present_of(name), row * capacity)
            if self._length:
                self._gpu.copy(larger, self._buffers[name][0], row * self._length)
            self._change_places(name)
            self._buffer(present_of(name), row * capacity)
        self._capacity = capacity

    def _change_places(self, name: str) -> None:
        """The present of a cache becomes its past."""
        present = present_of(name)
        self._buffers[name], self._buffers[present] = self._buffers[present], self._buffers.get(name, (0, 0))

    def _cache_shape(self, name: str, length: int) -> Shape:
        _, heads, _, width = self._engine.shape(name)
        return (1, heads, length, width)

    def close(self) -> None:
        """Free the model and its buffers."""
        with suppress(CudaError):  # after some failures the driver refuses everything
            self._gpu.activate()
            for address, _ in self._buffers.values():
                if address:
                    self._gpu.release(address)
        self._buffers.clear()
        self._profiles.clear()
        vars(self).pop("_engine", None)
        self._gpu.close()
