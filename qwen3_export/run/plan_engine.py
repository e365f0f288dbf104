"""A TensorRT plan as it was loaded: its tensors, types and profiles.

    INPUT    input_ids, attention_mask, position_ids   INT64       past_key_values.N.key/value   HALF, BF16 or FLOAT
    OUTPUT   logits                                    FLOAT       present.N.key/value           as its past

TensorRT reports a failed call by None or False, and tells the reason to its logger.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.memory import GPU_HINT, lacks_memory
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError
from qwen3_export.run.plan_files import PlanFiles

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
PAST, PRESENT = "past_key_values.", "present."
Shape = tuple[int, ...]

_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2}
# What TensorRT's reason has where the driver failed, and not the file.
_DRIVER = ("cudaerror", "cuda runtime", "driver")


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

    @property
    def context_length(self) -> int:
        """Tokens of a sequence, the last of which is decoded."""
        pasts = [shape[2] + 1 for name, shape in self.largest.items() if name.startswith(PAST)]
        return min(self.largest[MASK][1], *pasts)


class PlanEngine:
    """A plan in its GPU's memory.

    `pasts` are the caches that go in. Raises InputError for a plan that is damaged or none of a decoder, ResourceError
    where it does not fit into memory, MissingRuntimeError where this GPU or its driver cannot load it.
    """

    def __init__(self, trt: Any, files: PlanFiles) -> None:
        self._files, self.log = files, _logger(trt)
        self._runtime = trt.Runtime(self.log)
        self._engine = self._deserialized()
        self.names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._modes = {name: self._engine.get_tensor_mode(name).name for name in self.names}
        self.pasts = [name for name in self.names if name.startswith(PAST)]
        self._check_tensors()
        self.vocab_size = self.shape(LOGITS)[-1]

    def _deserialized(self) -> Any:
        engine = self._runtime.deserialize_cuda_engine(_mapped(self._files.plan))
        if engine is None:
            # Capability and version are those that engine.json names, if any: else driver, memory, or the file remain.
            error = self.failure("cannot load it")
            if type(error) is MissingRuntimeError and not any(word in self.log.reason().lower() for word in _DRIVER):
                raise self._damaged(f"{self._files.runtime} cannot load it ({self.log.reason()})")
            raise error
        return engine

    def failure(self, what: str) -> ExportError:
        """The error after a call that failed."""
        text = f"{self._files.plan}: {self._files.runtime} {what} ({self.log.reason()})"
        if any(map(lacks_memory, self.log.errors)):
            return ResourceError(text, GPU_HINT)
        return MissingRuntimeError(text, "see what nvidia-smi says; --device cpu runs the plan's ONNX")

    def profiles(self, stream: int) -> list[PlanProfile]:
        """A context for every profile, the narrowest first.

        A profile for one token alone is made for it.
        """
        found, inputs = [], [name for name in self.names if self._modes[name] == "INPUT"]
        for number in range(self._engine.num_optimization_profiles):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(number, stream):
                raise self.failure(f"has no context for profile {number}")
            shapes = {name: self._engine.get_tensor_profile_shape(name, number) for name in inputs}
            smallest = {name: tuple(shape[0]) for name, shape in shapes.items()}
            largest = {name: tuple(shape[2]) for name, shape in shapes.items()}
            found.append(PlanProfile(number, smallest, largest, context))
        return sorted(found, key=lambda profile: profile.most_tokens)

    def shape(self, name: str) -> Shape:
        """A tensor's shape, -1 where it is open."""
        return tuple(self._engine.get_tensor_shape(name))

    def item_bytes(self, name: str) -> int:
        """Bytes of one number of a cache or of the logits."""
        return _ITEM_BYTES[self._type(name)]

    def _type(self, name: str) -> str:
        return str(self._engine.get_tensor_dtype(name).name)

    def _check_tensors(self) -> None:
        """Refuse what this runner would feed or read wrongly."""
        wanted = {IDS: "INPUT", MASK: "INPUT", POSITIONS: "INPUT", LOGITS: "OUTPUT"}
        wanted |= dict.fromkeys(self.pasts, "INPUT") | {present_of(name): "OUTPUT" for name in self.pasts}
        for name in sorted(wanted.keys() ^ self._modes.keys()):
            raise self._damaged(f"{'it lacks' if name in wanted else 'no decoder of ours has'} the tensor {name}")
        for name, mode in wanted.items():
            kinds = ["INT64"] if name in (IDS, MASK, POSITIONS) else ["FLOAT"] if name == LOGITS else list(_ITEM_BYTES)
            if name.startswith(PRESENT):
                kinds = [self._type(PAST + name.removeprefix(PRESENT))]
            place = self._engine.get_tensor_location(name).name
            if (self._modes[name], place) != (mode, "DEVICE") or self._type(name) not in kinds:
                found = f"{self._type(name)} {self._modes[name]} in {place} memory"
                raise self._damaged(f"{name} is {found}, {' or '.join(kinds)} {mode} in DEVICE memory was expected")

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._files.plan}: {what}", "build it again")


def _mapped(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, outside of this process's memory.

    An empty file cannot be mapped.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def present_of(past: str) -> str:
    """The output that continues a cache."""
    return PRESENT + past.removeprefix(PAST)


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
            """The first error since `errors` was cleared; others follow from it."""
            return (self.errors[0] if self.errors else "no reason given").strip().splitlines()[0]

    return Log()
