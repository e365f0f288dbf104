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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.cuda import CudaError
from qwen3_export.errors import InputError
from qwen3_export.run.plan_files import PlanFiles, load_runtime, read_plan
from qwen3_export.run.session import RuntimeOptions, check_ids

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
_PAST, _PRESENT = "past_key_values.", "present."
_SMALLEST_CACHE = 256
_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class PlanProfile:
    """One optimization profile, and a context that runs it.

    It has the smallest and the largest shape of every input.
    """

    number: int
    smallest: Mapping[str, Shape]
    largest: Mapping[str, Shape]
    context: Any

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether every input's shape lies within."""
        return all(
            len(shape) == len(self.largest[name])
            and all(a <= b <= c for a, b, c in zip(self.smallest[name], shape, self.largest[name], strict=True))
            for name, shape in shapes.items()
        )

    @property
    def most_tokens(self) -> int:
        """New tokens that one step may bring."""
        return self.largest[IDS][1]


@dataclass
class _Cache:
    """Two buffers of one past and its present.

    `row_bytes` is one position of all heads.
    """

    shape: Shape
    row_bytes: int
    past: int
    present: int


class PlanSession:
    """See `run.session.Session`.

    Raises MissingRuntimeError where GPU, driver, library or version are not those of engine.json.
    """

    threads = 1

    def __init__(self, folder: Path, options: RuntimeOptions) -> None:
        files = read_plan(folder)
        self._folder = folder
        self._gpu, trt = load_runtime(files)
        self.runtime, self.version = files.runtime, files.version
        self.device = f"cuda ({self._gpu.name}, {self._gpu.capability})"
        self._log = _logger(trt)
        before = self._gpu.free_bytes()
        self._engine = self._deserialized(trt, files)
        self._profiles = self._read_profiles()
        self._item_bytes = {name: _item_bytes(self._engine, name) for name in _tensors(self._engine)}
        self.vocab_size = int(self._engine.get_tensor_shape(LOGITS)[-1])
        widest = max(self._profiles, key=lambda profile: profile.most_tokens)
        self.context = min(profile.largest[MASK][1] for profile in self._profiles)
        self._most_tokens = widest.most_tokens
        self._length = self._capacity = 0
        self._buffers: dict[str, tuple[int, int]] = {}
        self._caches: dict[str, _Cache] = {}
        self._grow(min(options.context or _SMALLEST_CACHE, self.context))
        self.device_memory_bytes = before - self._gpu.free_bytes()

    def _deserialized(self, trt: Any, files: PlanFiles) -> Any:
        runtime = trt.Runtime(self._log)
        engine = runtime.deserialize_cuda_engine(files.plan.read_bytes())
        if engine is None:
            raise InputError(f"{files.plan}: {self.runtime} cannot load it ({self._log.reason()})", "build it again")
        self._runtime = runtime
        return engine

    def _read_profiles(self) -> list[PlanProfile]:
        found = []
        for number in range(self._engine.num_optimization_profiles):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(number, self._gpu.stream):
                raise InputError(f"{self._folder}: no room for profile {number} ({self._log.reason()})")
            inputs = [name for name in _tensors(self._engine) if name not in _outputs(self._engine)]
            shapes = {name: self._engine.get_tensor_profile_shape(name, number) for name in inputs}
            smallest = {name: tuple(shape[0]) for name, shape in shapes.items()}
            largest = {name: tuple(shape[2]) for name, shape in shapes.items()}
            found.append(PlanProfile(number, smallest, largest, context))
        self._gpu.synchronize()
        # The narrowest first: a profile for one token alone is made for it.
        return sorted(found, key=lambda profile: profile.most_tokens)

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
        past, total = self._length, self._length + len(ids)
        try:
            self._gpu.activate()
            if total > self._capacity:
                self._grow(total)
            feeds = {
                IDS: ids.astype(np.int64)[None],
                MASK: np.ones((1, total), np.int64),
                POSITIONS: np.arange(past, total, dtype=np.int64)[None],
            }
            shapes = {name: values.shape for name, values in feeds.items()}
            shapes.update({name: _with_length(cache.shape, past) for name, cache in self._caches.items()})
            profile = self._profile_of(shapes)
            self._bind(profile.context, feeds, shapes, len(ids))
            if not profile.context.execute_async_v3(self._gpu.stream):
                raise InputError(f"{self._folder}: the plan cannot run ({self._log.reason()})")
            logits = np.empty((len(ids), self.vocab_size), np.float32)
            self._gpu.download(self._buffers[LOGITS][0], logits)
        except CudaError as error:
            raise InputError(f"{self._folder}: {error}") from error
        for cache in self._caches.values():
            cache.past, cache.present = cache.present, cache.past
        self._length = total
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

    def _bind(self, context: Any, feeds: Mapping[str, NDArray], shapes: Mapping[str, Shape], count: int) -> None:
        """Shapes and addresses of every input and output."""
        places = {name: self._uploaded(name, values) for name, values in feeds.items()}
        places[LOGITS] = self._buffer(LOGITS, count * self.vocab_size * self._item_bytes[LOGITS])
        for name, cache in self._caches.items():
            places[name], places[_present(name)] = cache.past, cache.present
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise InputError(f"{self._folder}: {name} {list(shape)} is refused ({self._log.reason()})")
        for name in _tensors(self._engine):
            if name not in places or not context.set_tensor_address(name, places[name]):
                raise InputError(f"{self._folder}: the plan has a tensor {name}, which no decoder of ours has")

    def _uploaded(self, name: str, values: NDArray) -> int:
        address = self._buffer(name, values.nbytes)
        self._gpu.upload(address, values)
        return address

    def _buffer(self, name: str, count: int) -> int:
        """A buffer that is kept, and replaced when it is too small."""
        address, size = self._buffers.get(name, (0, 0))
        if size < count:
            if address:
                self._gpu.release(address)
            address = self._gpu.allocate(count)
            self._buffers[name] = (address, count)
        return address

    def _grow(self, positions: int) -> None:
        """Room for so many positions in every cache; what is there is kept."""
        self._capacity = min(max(positions, 2 * self._capacity), self.context)
        for name in _tensors(self._engine):
            if not name.startswith(_PAST):
                continue
            old = self._caches.get(name)
            shape = tuple(self._engine.get_tensor_shape(name))
            row = self._item_bytes[name] * shape[1] * shape[3]
            past, present = (self._gpu.allocate(row * self._capacity) for _ in range(2))
            if old is not None:
                self._gpu.copy(past, old.past, row * self._length)
                self._gpu.release(old.past)
                self._gpu.release(old.present)
            self._caches[name] = _Cache((1, shape[1], 0, shape[3]), row, past, present)

    def close(self) -> None:
        """Free the model and its buffers."""
        self._gpu.activate()
        for cache in self._caches.values():
            self._gpu.release(cache.past)
            self._gpu.release(cache.present)
        for address, _ in self._buffers.values():
            self._gpu.release(address)
        del self._profiles, self._engine, self._runtime
        self._gpu.close()


def _with_length(shape: Shape, length: int) -> Shape:
    return (shape[0], shape[1], length, shape[3])


def _present(past: str) -> str:
    return _PRESENT + past.removeprefix(_PAST)


def _tensors(engine: Any) -> list[str]:
    return [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]


def _outputs(engine: Any) -> list[str]:
    return [name for name in _tensors(engine) if engine.get_tensor_mode(name).name == "OUTPUT"]


def _item_bytes(engine: Any, name: str) -> int:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _ITEM_BYTES:
        raise InputError(f"the plan's tensor {name} is {kind}, which no decoder of ours has", "build it again")
    return _ITEM_BYTES[kind]


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT complains about."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message)

        def reason(self) -> str:
            return (self.errors[-1] if self.errors else "no reason given").strip().splitlines()[0]

    return Log()
