"""Words for a lack of memory, of every runtime, and words that are none."""

from __future__ import annotations

import errno
import importlib
from pathlib import Path

import pytest

from qwen3_export.cli import _report
from qwen3_export.core.memory import lacks_memory, memory_named
from qwen3_export.errors import InputError, ResourceError
from qwen3_export.solve.blocks.rtn_without_torch import import_loops

# As the runtimes wrote them in processes with too little memory, or as they stand in their libraries.
LACK = [
    "Unable to allocate 1.86 MiB for an array with shape (1, 2, 1900, 128) and data type float32",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc",
    "BFCArena::AllocateRawInternal(size_t, bool, Stream*) Failed to allocate memory for buffer of size 7782400",
    "Available memory of 100 is smaller than requested bytes of 200",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 9",
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "unable to allocate CPU_REPACK buffer",
    "ggml_aligned_malloc: insufficient memory (attempted to allocate 96.00 MB)",
    "Error Code 2: OutOfMemory (Requested size was 99 bytes.)",
    "GPU memory allocation failed during initialization of layer: x",
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB",
    "[Errno 12] Cannot allocate memory",
    "libtorch_cpu.so: failed to map segment from shared object",
]
OTHER = [
    "[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model",
    "llama_model_load: error loading model: tensor 'x' data is not within the file bounds, model is corrupted",
    "Expected all tensors to be on the same device",
    "the kernel failed",
    "a.so: failed to map segment from shared object: Operation not permitted",
    "",
]


@pytest.mark.parametrize("text", LACK)
def test_a_lack_of_memory_is_exit_code_4_in_whose_words_ever(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lacks_memory(text)
    with pytest.raises(ResourceError, match="the model: out of memory") as caught, memory_named("the model"):
        raise RuntimeError(text + "\nand more")
    assert text in str(caught.value)
    assert _report(RuntimeError(text + "\nand more")) == 4
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"error: out of memory ({text})"
    assert said[1].startswith("hint: ")


@pytest.mark.parametrize("text", OTHER)
def test_other_errors_stay_what_they_are(text: str) -> None:
    assert not lacks_memory(text)
    with pytest.raises(RuntimeError), memory_named("the model"):
        raise RuntimeError(text)
    assert _report(RuntimeError(text)) == 2


def test_a_python_error_without_words_and_errors_of_ours() -> None:
    with pytest.raises(ResourceError, match=r"the model: out of memory \(MemoryError\)"), memory_named("the model"):
        raise MemoryError
    assert _report(MemoryError()) == 4
    with pytest.raises(InputError), memory_named("the model"):
        raise InputError("a folder that is named out of memory")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory", "model"),
        OSError("Could not load shared object file: libllvmlite.so: cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_a_library_or_a_file_that_lacks_memory(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(error) == 4
    assert capsys.readouterr().err.startswith("error: out of memory (")


def test_a_file_that_is_named_like_a_lack_of_memory() -> None:
    assert _report(FileNotFoundError(errno.ENOENT, "No such file", "out of memory")) == 2


def test_an_import_that_lacks_memory_asks_for_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise ImportError("libllvm.so: failed to map segment from shared object")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError):
        import_loops()


def test_a_full_disk_promises_to_go_on_only_where_something_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", "model", "-o", str(tmp_path / "out")]
    full = OSError(errno.ENOSPC, "No space left on device", "model")
    assert _report(full, arguments) == 4
    assert "goes on" not in capsys.readouterr().err
    (tmp_path / "out.partial").mkdir()
    assert _report(full, arguments) == 4
    assert "goes on where it stopped" in capsys.readouterr().err
    assert _report(full, ["recipes", "search", "model", "-o", str(tmp_path / "recipe.yaml")]) == 4
    assert "goes on" not in capsys.readouterr().err
