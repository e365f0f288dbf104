"""Damaged and hostile safetensors files: each one opens, or is a CheckpointError that names it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_export.core.tensorfile import DTYPES, TensorFile, TensorFileWriter, write_tensors
from qwen3_export.errors import CheckpointError


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Path]:
    """`raw(header, data)` writes a file with this header, an object or the very bytes."""

    def write(header: Any, data: bytes = b"", length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "hostile.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return write


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refuses(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorFile(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_a_length_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(b"\0" * size)
    refuses(path, "too short")


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 100])
def test_a_header_longer_than_the_file_is_refused_without_reading_it(raw: Callable[..., Path], length: int) -> None:
    refuses(raw({}, length=length), f"claims {length} bytes")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"nonsense", b"{}x", b"\xff\xfe\xff", b'{"a": NaN', b"[" * 100_000, b'{"a":' * 50_000]
)
def test_a_header_that_is_no_json_is_refused(raw: Callable[..., Path], text: bytes) -> None:
    refuses(raw(text), "no valid JSON")


@pytest.mark.parametrize("text", [b"[]", b"1", b'"text"', b"null", b"NaN"])
def test_a_header_that_is_no_object_is_refused(raw: Callable[..., Path], text: bytes) -> None:
    refuses(raw(text), "no JSON object")


def test_a_name_that_occurs_twice_is_refused(raw: Callable[..., Path]) -> None:
    one = json.dumps(entry())
    refuses(raw(f'{{"x": {one}, "x": {one}}}'.encode(), b"\0" * 8), "twice")


@pytest.mark.parametrize(
    "item",
    [
        [],
        "text",
        None,
        3,
        {},
        {"dtype": "F32", "shape": [2]},
        entry(dtype="F31"),
        entry(dtype=["F32"]),
        entry(dtype=None),
        entry(offsets=[0]),
        entry(offsets=[0, 8, 16]),
        entry(offsets=8),
        entry(shape=2),
        entry(shape=None),
    ],
)
def test_a_malformed_entry_is_refused(raw: Callable[..., Path], item: Any) -> None:
    refuses(raw({"x": item}, b"\0" * 8), "tensor x: its header entry is malformed or its dtype unknown")


@pytest.mark.parametrize(
    "item",
    [
        entry(shape=[-2], offsets=[8, 0]),
        entry(shape=[-1, -2]),
        entry(shape=["2"]),
        entry(shape="2"),
        entry(shape=[2.0]),
        entry(shape=[True, 2]),
        entry(offsets=[-8, 0]),
        entry(offsets=[0.0, 8.0]),
        entry(offsets=["0", "8"]),
        entry(shape=[int("9" * 4000), int("9" * 4000)]),
        entry(shape=[2**40] * 4000),
        entry(shape=[2] + [1] * 64),
    ],
)
def test_numbers_that_are_no_counts_are_refused(raw: Callable[..., Path], item: Any) -> None:
    refuses(raw({"x": item}, b"\0" * 8), "whole numbers, not negative")


@pytest.mark.parametrize(
    "item",
    [
        entry(shape=[3]),
        entry(shape=[1]),
        entry(shape=[]),
        entry(shape=[2, 0]),
        entry(dtype="F64"),
        entry(offsets=[8, 0]),
        entry(shape=[2**62, 2**62]),
    ],
)
def test_a_size_that_is_not_that_of_the_shape_is_refused(raw: Callable[..., Path], item: Any) -> None:
    refuses(raw({"x": item}, b"\0" * 8), "tensor x: .* needs .* its offsets span")


def test_data_beyond_the_end_of_the_file_is_refused(raw: Callable[..., Path]) -> None:
    refuses(raw({"x": entry()}, b"\0" * 7), "tensor x: its data ends at byte")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((0, 8), (4, 12), "tensor y: its data overlaps"),
        ((0, 8), (0, 8), "overlaps"),
        ((0, 8), (12, 20), "tensor y: its data leaves a hole"),
        ((4, 12), (12, 20), "tensor x: its data leaves a hole"),
    ],
)
def test_overlaps_and_holes_are_refused(
    raw: Callable[..., Path], first: tuple[int, int], second: tuple[int, int], message: str
) -> None:
    refuses(raw({"x": entry(offsets=first), "y": entry(offsets=second)}, b"\0" * 20), message)


def test_bytes_after_the_last_tensor_are_refused(raw: Callable[..., Path]) -> None:
    refuses(raw({"x": entry()}, b"\0" * 9), "1 bytes follow the last tensor")
    refuses(raw({}, b"\0"), "1 bytes follow the last tensor")


@pytest.mark.parametrize("metadata", [[], [1], "text", 3, {"key": 1}, {"key": None}, {"key": {}}])
def test_metadata_that_is_no_text_by_name_is_refused(raw: Callable[..., Path], metadata: Any) -> None:
    refuses(raw({"__metadata__": metadata, "x": entry()}, b"\0" * 8), "__metadata__")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "absent.safetensors", "cannot be read")
    (tmp_path / "folder.safetensors").mkdir()
    refuses(tmp_path / "folder.safetensors", "cannot be read")


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_when_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, [("x", np.ones(1000, "f4"))])
    file = TensorFile(path)
    with path.open("r+b") as handle:
        handle.truncate(2000)
    with pytest.raises(CheckpointError, match="tensor x: cannot be read"):
        file.read("x")
    writer = TensorFileWriter(tmp_path / "b.safetensors", {"x": (np.dtype("<f4"), (1000,))})
    with pytest.raises(CheckpointError, match="became shorter"), writer:
        writer.copy("x", file)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "valid.safetensors"
    tensors = {
        "a.weight": np.arange(6, dtype="f4").reshape(2, 3),
        "b": np.arange(4, dtype="i4"),
        "c": np.ones((), "u1"),
    }
    write_tensors(path, tensors.items())
    return path.read_bytes()


def read_as_the_library_does_or_refuse(path: Path) -> None:
    try:
        file = TensorFile(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "pt") as wanted:
        assert set(wanted.keys()) == set(file.entries)
        for name in file.entries:
            found = wanted.get_tensor(name).reshape(-1)
            assert file.read(name).tobytes() == found.view(torch.uint8).numpy().tobytes()


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some bytes replaced, then perhaps cut off or lengthened."""
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6))
    cut, extra = draw(st.one_of(st.none(), st.floats(0, 1))), draw(st.binary(max_size=3))

    def apply(data: bytes) -> bytes:
        damaged = bytearray(data)
        for place, value in flips:
            damaged[int(place * len(data))] = value
        return bytes(damaged[: len(data) if cut is None else int(cut * len(data))]) + extra

    return apply


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage())
def test_damaged_files_open_or_are_checkpoint_errors(
    tmp_path: Path, valid: bytes, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(valid))
    read_as_the_library_does_or_refuse(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**40), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3))
def test_any_json_header_opens_or_is_a_checkpoint_error(tmp_path: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 24)
    read_as_the_library_does_or_refuse(path)
