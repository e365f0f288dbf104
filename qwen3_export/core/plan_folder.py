"""What a TensorRT folder tells of its plan: engine.json and the plan's first bytes.

engine.json    engine, version, compute_capabilities, profile …
model.plan     the engine itself; TensorRT-RTX begins it with

0   4s   magic, "vtrt"             TensorRT-RTX 1.7; other engines have other headers
16  u64  size of the file
24  4*u8 version
32  u64  compute capabilities, one bit each
56  u64  bytes of weights
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import open_regular, read_object
from qwen3_export.errors import InputError

PLAN, ENGINE = "model.plan", "engine.json"
# Engines and their packages.
ENGINES = {"rtx": "tensorrt-rtx", "trt": "tensorrt"}
# Bit of each compute capability in a TensorRT-RTX plan's header.
CAPABILITIES = {"7.5": 0x01, "8.0": 0x02, "8.6": 0x04, "8.9": 0x08, "12.0": 0x10, "12.1": 0x20}
_MAGIC, _LENGTH = b"vtrt", 64
_AGAIN = "export the folder again, or copy it again"


@dataclass(frozen=True)
class PlanHeader:
    """The fields of a TensorRT-RTX plan's header that are known."""

    magic: bytes
    size: int
    version: str
    capabilities: int
    weight_bytes: int


def read_engine(folder: Path) -> dict[str, Any]:
    """Read engine.json; InputError when it is damaged or names an unknown engine."""
    path = folder / ENGINE
    values = read_object(path, hint="export the folder again")
    engine = values.get("engine")
    if not isinstance(engine, str) or engine not in ENGINES:
        raise InputError(f"{path}: engine is {str(engine)[:40]!r}, one of {', '.join(ENGINES)} was expected", _AGAIN)
    return values


def read_plan_header(path: Path) -> PlanHeader:
    """The header of a TensorRT-RTX plan, or what stands in its place."""
    with open_regular(path) as file:
        data = file.read(_LENGTH)
    return PlanHeader(
        data[:4],
        int.from_bytes(data[16:24], "little"),
        ".".join(map(str, data[24:28])),
        int.from_bytes(data[32:40], "little"),
        int.from_bytes(data[56:64], "little"),
    )


def capability_bits(names: Iterable[str]) -> int:
    """Compute capabilities as a plan's header has them."""
    return sum(CAPABILITIES.get(name, 0) for name in set(names))


def why_damaged(folder: Path) -> str | None:
    """What is wrong with a plan's first bytes and size, or None.

    Only TensorRT-RTX's headers are known. What engine.json does not name is not compared.
    """
    described, path = read_engine(folder), folder / PLAN
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    if described["engine"] != "rtx":
        return None
    header = read_plan_header(path)
    if header.magic != _MAGIC:
        return f"it begins with {header.magic!r}, a TensorRT-RTX plan begins with {_MAGIC!r}"
    if header.size != size:
        return f"by its header it has {header.size} bytes, the file has {size}"
    version, named = described.get("version"), described.get("compute_capabilities")
    if version and header.version != version:
        return f"by its header it is of version {header.version}, by {ENGINE} of {version}"
    if version and isinstance(named, list) and header.capabilities != capability_bits(map(str, named)):
        return f"its header has other compute capabilities ({header.capabilities:#x}) than {ENGINE}: {', '.join(named)}"
    return None


def check_plan(folder: Path) -> None:
    """Raise InputError for a plan that is damaged by its first bytes and size."""
    if reason := why_damaged(folder):
        raise InputError(f"{folder / PLAN}: the plan is damaged: {reason}", _AGAIN)
