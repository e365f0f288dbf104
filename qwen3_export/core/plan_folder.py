"""What a TensorRT folder tells of its plan: engine.json and the plan's first bytes.

engine.json    engine, version, compute_capabilities, profile …; of a plan that was built here plan_bytes, plan_sha256
model.plan     the engine itself

0   4s   magic: "vtrt" of TensorRT-RTX, "ftrt" of TensorRT
4   u32  form of what follows: 0
16  u64  size of the file                      TensorRT-RTX alone, as what follows the version
24  4*u8 version
32  u64  compute capabilities, one bit each
56  u64  bytes of weights

TensorRT-RTX's were found in plans of 1.7. TensorRT's are those that trtexec reads for --getPlanVersionOnly
(`printPlanVersion` in samples/common/sampleEngines.cpp of NVIDIA/TensorRT, 9.3 to 11.1); no more of them is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.files import open_regular, read_object
from qwen3_export.core.manifest import sha256_file
from qwen3_export.errors import InputError

PLAN, ENGINE = "model.plan", "engine.json"
# Engines and their packages.
ENGINES = {"rtx": "tensorrt-rtx", "trt": "tensorrt"}
# Bit of each compute capability in a TensorRT-RTX plan's header.
CAPABILITIES = {"7.5": 0x01, "8.0": 0x02, "8.6": 0x04, "8.9": 0x08, "12.0": 0x10, "12.1": 0x20}
# First bytes of a plan, and the name of what writes it.
_BEGINS = {"rtx": (b"vtrt", "TensorRT-RTX"), "trt": (b"ftrt", "TensorRT")}
_LENGTH, _VERSION_ENDS = 64, 28
_AGAIN = "export the folder again, or copy it again"


@dataclass(frozen=True)
class PlanHeader:
    """The fields of a plan's header that are known.

    Of TensorRT's only magic, form and version mean anything.
    """

    magic: bytes
    form: int
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
    """The header of a plan, or what stands in its place."""
    with open_regular(path) as file:
        data = file.read(_LENGTH)
    return PlanHeader(
        data[:4],
        int.from_bytes(data[4:8], "little"),
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

    What engine.json does not name is not compared.
    """
    described, path = read_engine(folder), folder / PLAN
    size, named = path.stat().st_size, described.get("plan_bytes")
    if size == 0:
        return "it is empty"
    if named is not None and named != size:
        return f"by {ENGINE} it has {named} bytes, the file has {size}"
    header, (magic, tool) = read_plan_header(path), _BEGINS[described["engine"]]
    if header.magic != magic:
        return f"it begins with {header.magic!r}, a {tool} plan begins with {magic!r}"
    if described["engine"] == "trt":
        return _classic(header, size, described)
    if header.size != size:
        return f"by its header it has {header.size} bytes, the file has {size}"
    version, named = described.get("version"), described.get("compute_capabilities")
    if version and header.version != version:
        return _of_another(header, version)
    if version and isinstance(named, list) and header.capabilities != capability_bits(map(str, named)):
        return f"its header has other compute capabilities ({header.capabilities:#x}) than {ENGINE}: {', '.join(named)}"
    return None


def _classic(header: PlanHeader, size: int, described: Mapping[str, Any]) -> str | None:
    """What is wrong with the header of a TensorRT plan.

    The last number of a version is not compared: packages do not always name it.
    """
    if size < _VERSION_ENDS:
        return f"it ends in its header, after {size} bytes"
    version = re.match(r"\d+\.\d+\.\d+", str(described.get("version") or ""))
    if version and header.form == 0 and header.version.rpartition(".")[0] != version[0]:
        return _of_another(header, described["version"])
    return None


def _of_another(header: PlanHeader, version: object) -> str:
    return f"by its header it is of version {header.version}, by {ENGINE} of {version}"


def check_plan(folder: Path, whole: bool = False) -> None:
    """Raise InputError for a plan that is damaged by its first bytes and size.

    With `whole`, all of its bytes are compared with the hash in engine.json, where one is there.
    """
    reason, described = why_damaged(folder), read_engine(folder)
    if reason is None and whole and (named := described.get("plan_sha256")) is not None:
        found = sha256_file(folder / PLAN)
        reason = None if found == named else f"its sha256 is {found}, by {ENGINE} {named}"
    if reason:
        built = f"build it again, with the command under trtexec in {ENGINE}, or copy it again"
        raise InputError(f"{folder / PLAN}: the plan is damaged: {reason}", built if "trtexec" in described else _AGAIN)
