"""Our safetensors reader and writer against the `safetensors` library."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from qwen3_export.core.tensorfile import DTYPES, StoredTensor, TensorFile, TensorFileWriter, write_tensors
from qwen3_export.model.decoder import to_torch

NUMPY_DTYPES = {name: dtype for name, dtype in DTYPES.items() if not dtype.name.startswith(("bfloat", "float8"))}


def sample(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bit pattern of the type; for booleans, 0 or 1."""
    random = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype == np.dtype("?"):
        return random.integers(0, 2, count).astype("?").reshape(shape)
    return np.frombuffer(random.bytes(count * dtype.itemsize), dtype).reshape(shape)


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def test_files_of_the_safetensors_library_are_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {name: sample(dtype, (3, 5, 2)) for name, dtype in NUMPY_DTYPES.items()}
    tensors["empty"], tensors["scalar"] = np.empty((0, 4), np.float32), np.array(3.5, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "np", "key": "wert ü"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "np", "key": "wert ü"}
    assert set(file.entries) == set(tensors)
    for name, wanted in tensors.items():
        assert_same_bits(file.read(name), wanted)


def test_files_of_torch_are_read_bit_for_bit_bf16_and_fp8_included(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.from_numpy(sample(np.dtype(np.int16), (7, 3)).copy()).view(torch.bfloat16),
        "fp8": torch.from_numpy(sample(np.dtype(np.uint8), (4, 4)).copy()).view(torch.float8_e4m3fn),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {}
    assert file.read("bf16").dtype == ml_dtypes.bfloat16
    assert file.read("fp8").dtype == ml_dtypes.float8_e4m3fn
    for name, wanted in tensors.items():
        assert file.read(name).tobytes() == wanted.view(torch.uint8).numpy().tobytes()


def test_the_safetensors_library_reads_our_files_bit_for_bit(tmp_path: Path) -> None:
    tensors = {name: sample(dtype, (4, 6)) for name, dtype in DTYPES.items()}
    tensors["empty"], tensors["scalar"] = np.empty((0, 4), np.float32), np.array(3.5, np.float32)
    write_tensors(tmp_path / "a.safetensors", tensors.items(), {"format": "pt", "note": "中"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "中"}
        assert set(file.keys()) == set(tensors)
        for name, wanted in tensors.items():
            found = file.get_tensor(name)
            assert tuple(found.shape) == wanted.shape
            assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == wanted.tobytes()
        assert file.get_tensor("BF16").dtype == torch.bfloat16
        assert file.get_tensor("F8_E4M3").dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "I32", "I64", "U8"])
def test_numpy_to_torch_keeps_type_and_bits(name: str) -> None:
    array = sample(DTYPES[name], (3, 4)).copy()
    tensor = to_torch(array)
    assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes()
    assert str(tensor.dtype).removeprefix("torch.") == array.dtype.name


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    array = sample(np.dtype("<f4"), (9, 4, 2))
    write_tensors(tmp_path / "a.safetensors", [("first", sample(np.dtype("<i8"), (3,))), ("x", array)])
    file = TensorFile(tmp_path / "a.safetensors")
    for begin, end in ((0, 9), (2, 5), (8, 9), (3, 3)):
        assert_same_bits(file.rows("x", begin, end), array[begin:end])


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (1200, 500)])
def test_an_unread_tensor_has_the_same_elements_whole_and_in_pieces(tmp_path: Path, shape: tuple[int, ...]) -> None:
    wanted = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
    write_tensors(tmp_path / "a.safetensors", [("b", sample(np.dtype(np.int8), (5,))), ("a", wanted)])
    unread = StoredTensor(TensorFile(tmp_path / "a.safetensors"), "a")
    assert (unread.dtype, unread.shape) == (wanted.dtype, wanted.shape)
    assert_same_bits(unread.whole(), wanted)
    pieces = [piece.copy() for piece in unread.pieces()]
    assert all(piece.nbytes <= 1 << 20 for piece in pieces)
    assert_same_bits(np.concatenate([np.empty(0, wanted.dtype), *pieces]).reshape(shape), wanted)


def test_the_writer_takes_non_contiguous_arrays_pieces_and_copies(tmp_path: Path) -> None:
    array = sample(np.dtype("<f4"), (10, 6))
    write_tensors(tmp_path / "a.safetensors", [("x", array), ("y", array[:2])])
    source = TensorFile(tmp_path / "a.safetensors")
    specs = {"t": (array.dtype, (6, 10)), "x": (array.dtype, (10, 6)), "y": (array.dtype, (2, 6))}
    with TensorFileWriter(tmp_path / "b.safetensors", specs) as writer:
        writer.write("t", array.T)
        with writer.pieces("x") as write:
            write(array[:3]), write(array[3:])
        writer.copy("y", source)
    copied = TensorFile(tmp_path / "b.safetensors")
    assert_same_bits(copied.read("t"), np.ascontiguousarray(array.T))
    assert_same_bits(copied.read("x"), array)
    assert_same_bits(copied.read("y"), array[:2])


def test_tensor_data_starts_at_a_multiple_of_eight(tmp_path: Path) -> None:
    for length in range(1, 10):
        path = tmp_path / "a.safetensors"
        write_tensors(path, [("n" * length, np.ones(1, np.float32))])
        assert TensorFile(path).entries["n" * length].begin % 8 == 0


@pytest.mark.parametrize(
    ("name", "array"),
    [("y", np.ones(2, "f4")), ("x", np.ones(3, "f4")), ("x", np.ones(2, "f8")), ("z", np.ones(2, "f4"))],
)
def test_the_writer_refuses_what_was_not_announced(tmp_path: Path, name: str, array: np.ndarray) -> None:
    specs = {"x": (np.dtype("<f4"), (2,)), "y": (np.dtype("<f4"), (2,))}
    with (
        pytest.raises(ValueError, match="announced"),
        TensorFileWriter(tmp_path / "a.safetensors", specs) as writer,
    ):
        writer.write(name, array)


def test_the_writer_refuses_to_leave_a_tensor_out(tmp_path: Path) -> None:
    specs = {"x": (np.dtype("<f4"), (2,)), "y": (np.dtype("<f4"), (2,))}
    with pytest.raises(ValueError, match="y was announced"), TensorFileWriter(tmp_path / "a", specs) as writer:
        writer.write("x", np.ones(2, "f4"))


def test_pieces_must_fill_the_tensor(tmp_path: Path) -> None:
    specs = {"x": (np.dtype("<f4"), (4, 2))}
    with (
        pytest.raises(ValueError, match="do not fill"),
        TensorFileWriter(tmp_path / "a", specs) as writer,
        writer.pieces("x") as write,
    ):
        write(np.ones((3, 2), "f4"))
