"""A fake of TensorRT's Python API over a fake driver, with the rules of NvInferRuntime.h.

A step runs the plan's ONNX in ONNX Runtime on the buffers whose addresses were set, in the shapes that were set, when
the stream is synchronized. A wrong name, shape, address or order gives other logits, or the failure that TensorRT
reports: False, and a reason for the logger. Types, modes and shapes are the real module's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import tensorrt_rtx as real

from qwen3_export.core.plan_folder import capability_bits
from qwen3_export.ship.tensorrt.profiles import Profile
from tests.unit.run.fake_cuda import FakeDriver

TYPES = {"tensor(float)": real.float32, "tensor(float16)": real.float16, "tensor(int64)": real.int64}
PROFILE = Profile(max_prompt=16, max_context=96)
Profiles = list[dict[str, Any]]


def plan_bytes(magic: bytes, version: str, capabilities: Sequence[str] = (), rest: bytes = b"") -> bytes:
    """A plan's header, with something behind it."""
    data = bytearray(64) + rest
    data[:4], data[16:24] = magic, len(data).to_bytes(8, "little")
    data[24:28] = bytes(map(int, version.split(".")))
    data[32:40] = capability_bits(capabilities).to_bytes(8, "little")
    return bytes(data)


class FakeContext:
    """`IExecutionContext`: one profile, shapes and addresses."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        if not 0 <= number < self._engine.num_optimization_profiles or stream not in self._engine.driver.streams:
            return self._engine.refuse(f"optimization profile {number} is out of range")
        # Shapes must be set again for a new profile.
        self.profile, self.shapes = number, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._engine.items[name].inward is False:
            return self._engine.refuse(f"{name} is no input")
        open_shape = self._engine.get_tensor_shape(name)
        if len(shape) != len(open_shape):
            return self._engine.refuse(f"{name} has {len(open_shape)} dimensions")
        if any(wanted not in (-1, size) for wanted, size in zip(open_shape, shape, strict=True)):
            return self._engine.refuse(f"{name}: static dimension mismatch")
        least, _, most = self._engine.get_tensor_profile_shape(name, self.profile)
        if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            return self._engine.refuse(f"{name} {shape} does not satisfy profile {self.profile}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.items or address % 256:
            return self._engine.refuse(f"{name}: unknown, or {address:#x} is not aligned")
        self.places[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, items = self._engine, self._engine.items
        if engine.fails:
            return engine.refuse(*engine.fails)
        unset = [name for name, item in items.items() if item.inward and name not in self.shapes]
        unset += [name for name in items if not self.places.get(name)]
        if unset:
            return engine.refuse(f"shape or address of {', '.join(unset)} is not set")
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            for axis, size in zip(items[name].shape, shape, strict=True):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    return engine.refuse(f"{name}: {axis} is {size}, and {sizes[axis]} elsewhere")
        if sizes["past_sequence_length"] + sizes["sequence_length"] != sizes["total_sequence_length"]:
            return engine.refuse(f"broadcast of {sizes}")
        outward = [name for name in items if not items[name].inward]
        places = dict(self.places)
        assert not {places[name] for name in outward} & {places[name] for name in self.shapes}, "an output is an input"
        assert len({places[name] for name in outward}) == len(outward), "two outputs in one place"
        shapes = dict(self.shapes)
        engine.driver.enqueue(stream, lambda: engine.compute(shapes, places, sizes), list(places.values()))
        engine.steps.append((self.profile, shapes["input_ids"][1]))
        return True


class FakeEngine:
    """`ICudaEngine` of a folder's ONNX; `kinds` and `locations` are what tests change."""

    def __init__(self, folder: Path, driver: FakeDriver, profiles: Profiles, log: Any) -> None:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"]
        )
        self.driver, self.log, self._profiles = driver, log, profiles
        self.num_optimization_profiles = len(profiles)
        self.steps: list[tuple[int, int]] = []
        self.fails: tuple[str, ...] = ()
        inward, outward = self.session.get_inputs(), self.session.get_outputs()
        self.items = {
            item.name: SimpleNamespace(shape=item.shape, kind=TYPES[item.type], inward=item in inward, place="DEVICE")
            for item in (*inward, *outward)
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self.items)

    def refuse(self, *reasons: str) -> bool:
        for reason in reasons:
            self.log.log(real.ILogger.ERROR, reason)
        return False

    def compute(self, shapes: dict[str, Any], places: dict[str, int], sizes: dict[str, int]) -> None:
        """The kernels, when their turn has come."""
        driver, feeds = self.driver, {}
        for name, shape in shapes.items():
            dtype = np.dtype(real.nptype(self.items[name].kind))
            given = driver.bytes_at(places[name], int(np.prod(shape)) * dtype.itemsize)
            feeds[name] = np.frombuffer(bytes(given), dtype).reshape(shape)
        names = [item.name for item in self.session.get_outputs()]
        for name, values in zip(names, self.session.run(names, feeds), strict=True):
            assert values.shape == tuple(sizes.get(axis, axis) for axis in self.items[name].shape)
            driver.bytes_at(places[name], values.nbytes)[:] = values.tobytes()

    def get_tensor_name(self, index: int) -> str:
        return list(self.items)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return real.TensorIOMode.INPUT if self.items[name].inward else real.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.items[name].kind

    def get_tensor_location(self, name: str) -> Any:
        return getattr(real.TensorLocation, self.items[name].place)

    def get_tensor_shape(self, name: str) -> Any:
        return real.Dims([size if isinstance(size, int) else -1 for size in self.items[name].shape])

    def get_tensor_profile_shape(self, name: str, number: int) -> list[Any]:
        assert self.items[name].inward
        return [real.Dims(list(shape)) for shape in self._profiles[number][name]]

    def create_execution_context(self) -> FakeContext | None:
        return FakeContext(self)


def fake_module(folder: Path, driver: FakeDriver, profiles: Profiles, version: str | None = None) -> Any:
    """A fake `tensorrt_rtx`; `made` holds the engine that was opened, `change` is called with it first."""

    class Runtime:
        def __init__(self, log: Any) -> None:
            assert isinstance(log, real.ILogger)
            self._log = log

        def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
            if bytes(memoryview(plan)[:4]) not in (b"vtrt", b"ftrt") or b"damaged" in bytes(plan):
                self._log.log(real.ILogger.ERROR, "Error Code 1: Serialization (magic tag does not match)\nat a place")
                self._log.log(real.ILogger.ERROR, "what follows from it")
                return None
            made.append(FakeEngine(folder, driver, profiles, self._log))
            module.change(made[-1])
            return made[-1]

    made: list[FakeEngine] = []
    stated = json.loads((folder / "engine.json").read_text())["version"]
    module = SimpleNamespace(
        ILogger=real.ILogger, Runtime=Runtime, __version__=version or stated, made=made, change=lambda engine: None
    )
    return module
