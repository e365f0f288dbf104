"""Words for a lack of memory, of every runtime, and words that are none."""

from __future__ import annotations

import pytest

from qwen3_export.cli import _report
from qwen3_export.core.memory import lacks_memory, memory_named
from qwen3_export.errors import InputError, ResourceError

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
]
OTHER = [
    "[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model",
    "llama_model_load: error loading model: tensor 'x' data is not within the file bounds, model is corrupted",
    "Expected all tensors to be on the same device",
    "the kernel failed",
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
