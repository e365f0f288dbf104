"""What a plan's first bytes, its size and engine.json tell of each other, for both engines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.plan_folder import check_plan, read_plan_header, why_damaged
from qwen3_export.errors import InputError
from tests.unit.run.fake_tensorrt import plan_bytes

CLASSIC, RTX = plan_bytes(b"ftrt", "10.13.3.9", rest=b"rest"), plan_bytes(b"vtrt", "1.7.1.116", ("8.9",), b"rest")


def folder(place: Path, plan: bytes, engine: str = "trt", **described: Any) -> Path:
    (place / "model.plan").write_bytes(plan)
    (place / "engine.json").write_text(json.dumps({"engine": engine, **described}))
    return place


@pytest.mark.parametrize("version", [None, "10.13.3.9", "10.13.3", "10.13.3.9.post1", "10.13.3b2", "unknown"])
def test_a_classic_plan_is_sound(version: str | None, tmp_path: Path) -> None:
    found = folder(tmp_path, CLASSIC, version=version, plan_bytes=len(CLASSIC))
    assert why_damaged(found) is None
    header = read_plan_header(found / "model.plan")
    assert (header.magic, header.form, header.version) == (b"ftrt", 0, "10.13.3.9")


def test_where_its_version_lies_is_known_of_one_form(tmp_path: Path) -> None:
    other = CLASSIC[:4] + b"\1\0\0\0" + CLASSIC[8:]
    assert why_damaged(folder(tmp_path, other, version="11.0.0.1")) is None


DAMAGED: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "empty": (b"", {}, "it is empty"),
    "of another engine": (RTX, {}, "it begins with b'vtrt', a TensorRT plan begins with b'ftrt'"),
    "no plan": (b"<html>", {}, "it begins with b'<htm', a TensorRT plan begins with b'ftrt'"),
    "cut in its header": (CLASSIC[:20], {}, "it ends in its header, after 20 bytes"),
    "of another version": (
        CLASSIC,
        {"version": "10.9.0.34"},
        "by its header it is of version 10.13.3.9, by engine.json of 10.9.0.34",
    ),
    "cut": (CLASSIC[:-1], {"plan_bytes": len(CLASSIC)}, "by engine.json it has 68 bytes, the file has 67"),
    "rtx, of another engine": (
        CLASSIC,
        {"engine": "rtx"},
        "begins with b'ftrt', a TensorRT-RTX plan begins with b'vtrt'",
    ),
    "rtx, cut": (RTX[:-1], {"engine": "rtx"}, "by its header it has 68 bytes, the file has 67"),
    "rtx, of another version": (
        RTX,
        {"engine": "rtx", "version": "1.8"},
        "of version 1.7.1.116, by engine.json of 1.8",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_told(name: str, tmp_path: Path) -> None:
    plan, described, reason = DAMAGED[name]
    found = folder(tmp_path, plan, **described)
    assert reason in str(why_damaged(found))
    with pytest.raises(InputError, match=r"model\.plan: the plan is damaged: ") as caught:
        check_plan(found)
    assert caught.value.hint == "export the folder again, or copy it again"


def test_the_hash_is_compared_where_the_plan_is_served(tmp_path: Path) -> None:
    found = folder(tmp_path, CLASSIC, plan_bytes=len(CLASSIC), plan_sha256=hashlib.sha256(CLASSIC).hexdigest())
    check_plan(found, whole=True)
    (found / "model.plan").write_bytes(CLASSIC[:-1] + b"?")
    check_plan(found)
    with pytest.raises(InputError, match=r"its sha256 is [0-9a-f]{64}, by engine\.json [0-9a-f]{64}"):
        check_plan(found, whole=True)


def test_a_plan_that_is_built_on_its_device_is_built_again(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_plan(folder(tmp_path, b"<html>", trtexec="trtexec --onnx=model.onnx"))
    assert caught.value.hint == "build it again, with the command under trtexec in engine.json, or copy it again"
