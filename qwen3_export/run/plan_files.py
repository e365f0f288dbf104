"""What a TensorRT folder says about its plan, and why it cannot run here.

    model.plan     the engine, for the devices and the version that engine.json names
    engine.json    engine, version, compute_capabilities, profile …

Nothing of TensorRT is loaded before the driver has been found.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.cuda import Gpu
from qwen3_export.core.plan_folder import ENGINE, ENGINES, PLAN, read_engine
from qwen3_export.core.process import uninterrupted
from qwen3_export.errors import MissingRuntimeError

_MODULES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
_INSTALL = {"rtx": "pip install 'qwen3-export[tensorrt]'", "trt": "install TensorRT for this device"}
_BUILD = "build the plan for this device with `qwen3-export tensorrt`, or leave --device away to run its ONNX"


@dataclass(frozen=True)
class PlanFiles:
    """A plan with the device and version it was built for.

    `version` is None where the folder does not tell it (`--onnx-only`), and `capabilities` are empty then.
    """

    plan: Path
    engine: str
    version: str | None
    capabilities: tuple[str, ...]

    @property
    def runtime(self) -> str:
        """The name of the plan's own runtime."""
        return ENGINES[self.engine]


def has_plan(artifact: Path) -> bool:
    """Whether a path is a folder with a plan and its description."""
    return (artifact / ENGINE).is_file() and (artifact / PLAN).is_file()


def read_plan(folder: Path) -> PlanFiles:
    """Read engine.json; InputError when it is damaged or names an unknown engine."""
    values = read_engine(folder)
    version, named = values.get("version"), values.get("compute_capabilities")
    return PlanFiles(
        folder / PLAN,
        values["engine"],
        str(version) if version else None,
        tuple(map(str, named)) if isinstance(named, list) else (),
    )


def load_runtime(files: PlanFiles) -> tuple[Gpu, Any]:
    """The GPU and the plan's TensorRT module.

    Raises MissingRuntimeError, which names what is not there or what differs from engine.json. A version that is not
    named there is not compared: TensorRT itself refuses the plan of another.
    """
    module = _MODULES[files.engine]
    if importlib.util.find_spec(module) is None:
        raise MissingRuntimeError(f"{files.runtime} is not installed", _INSTALL[files.engine])
    gpu = Gpu()
    try:
        _check_capability(files, gpu)
        with uninterrupted():
            loaded = importlib.import_module(module)
        if files.version and loaded.__version__ != files.version:
            raise MissingRuntimeError(
                f"{files.runtime} {loaded.__version__} is installed, the plan is one of {files.version}",
                f"pip install {files.runtime}=={files.version}, or build the plan again",
            )
    except BaseException:
        gpu.close()
        raise
    return gpu, loaded


def _check_capability(files: PlanFiles, gpu: Gpu) -> None:
    if files.capabilities and gpu.capability not in files.capabilities:
        raise MissingRuntimeError(
            f"{gpu.name} has compute capability {gpu.capability}, the plan is for {', '.join(files.capabilities)}",
            _BUILD,
        )
