"""A fake of TensorRT's Python API and the CUDA driver, in host memory.

`execute_async_v3` runs the plan's ONNX in ONNX Runtime on the buffers at the addresses that were set, in the shapes
that were set: a wrong name, shape, address or order gives other logits, or an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from qwen3_export.errors import ResourceError

TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


@dataclasses.dataclass
class FakeGpu:
    """`core.cuda.Gpu` with `room` bytes of host memory."""

    capability: str = "8.9"
    name: str = "Fake RTX"
    stream: int = 7
    room: int = 1 << 30

    def __post_init__(self) -> None:
        self.buffers: dict[int, bytearray] = {}
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.closed = False
        self._addresses = itertools.count(1 << 20, 1 << 20)

    def open(self) -> FakeGpu:
        self.closed = False
        return self

    def activate(self) -> None:
        assert not self.closed

    def free_bytes(self) -> int:
        return self.room - sum(map(len, self.buffers.values()))

    def allocate(self, count: int) -> int:
        if count > self.free_bytes():
            raise ResourceError("the GPU's memory is full")
        address = next(self._addresses)
        self.buffers[address] = bytearray(count)
        return address

    def release(self, address: int) -> None:
        del self.buffers[address]

    def upload(self, address: int, values: NDArray) -> None:
        assert values.flags.c_contiguous
        self.uploads.append(values.nbytes)
        self.buffers[address][: values.nbytes] = values.tobytes()

    def download(self, address: int, values: NDArray) -> None:
        self.downloads.append(values.nbytes)
        values[...] = np.frombuffer(self.buffers[address], values.dtype, values.size).reshape(values.shape)

    def copy(self, target: int, source: int, count: int) -> None:
        self.buffers[target][:count] = self.buffers[source][:count]

    def synchronize(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


class FakeContext:
    """`IExecutionContext`: one profile, shapes and addresses."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream == self._engine.gpu.stream
        self.profile = number
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self.profile)
        fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.places[name] = address
        return address in self._engine.gpu.buffers

    def execute_async_v3(self, stream: int) -> bool:
        engine, buffers = self._engine, self._engine.gpu.buffers
        engine.steps.append((self.profile, self.shapes["input_ids"][1]))
        if engine.fails:
            engine.log.log(1, "Error Code 1: the kernel failed\nat some place")
            return False
        feeds = {}
        for item in engine.session.get_inputs():
            dtype, shape = NUMPY[TYPES[item.type]], self.shapes[item.name]
            count = int(np.prod(shape))
            feeds[item.name] = np.frombuffer(buffers[self.places[item.name]], dtype, count).reshape(shape)
        names = [item.name for item in engine.session.get_outputs()]
        for name, values in zip(names, engine.session.run(names, feeds), strict=True):
            place = buffers[self.places[name]]
            assert len(place) >= values.nbytes, f"{name} has {len(place)} bytes for {values.nbytes}"
            place[: values.nbytes] = values.tobytes()
        return True


class FakeEngine:
    """`ICudaEngine` of a folder's ONNX, with the profiles that its engine.json names."""

    def __init__(self, folder: Path, gpu: FakeGpu, profiles: list[dict[str, Any]], log: Any) -> None:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"]
        )
        self.gpu, self.log, self._profiles = gpu, log, profiles
        self.num_optimization_profiles = len(profiles)
        self.steps: list[tuple[int, int]] = []
        self.fails = False
        self._outputs = {item.name for item in self.session.get_outputs()}
        self._items = {item.name: item for item in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self._items)

    def get_tensor_name(self, index: int) -> str:
        return list(self._items)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="OUTPUT" if name in self._outputs else "INPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[self._items[name].type])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self._items[name].shape]

    def get_tensor_profile_shape(self, name: str, number: int) -> list[list[int]]:
        return self._profiles[number][name]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


def fake_module(folder: Path, gpu: FakeGpu, profiles: list[dict[str, Any]], version: str | None = None) -> Any:
    """A fake `tensorrt_rtx` module; `made` holds the engine that was opened."""

    class Logger:
        ERROR = 1

    made: list[FakeEngine] = []

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            if plan[:4] != b"vtrt":
                self._log.log(1, "magic tag does not match")
                return None
            made.append(FakeEngine(folder, gpu, profiles, self._log))
            return made[0]

    stated = json.loads((folder / "engine.json").read_text())["version"]
    return SimpleNamespace(ILogger=Logger, Runtime=Runtime, __version__=version or stated, made=made)
