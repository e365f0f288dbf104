"""The NVIDIA GPU of this machine: name, capability, buffers, copies, one stream.

Everything goes through the driver's own library, whose interface is stable. Nothing has to be installed for it: where
there is a GPU, there is `libcuda.so.1`.

CUDA Driver API: https://docs.nvidia.com/cuda/cuda-driver-api
"""

from __future__ import annotations

import ctypes as C
from contextlib import suppress
from typing import Any

from numpy.typing import NDArray

from qwen3_export.core.memory import GPU_HINT
from qwen3_export.errors import MissingRuntimeError, ResourceError

LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2
_MAJOR, _MINOR = 75, 76
_NON_BLOCKING = 1
_HINT = "see what nvidia-smi says"


class CudaError(MissingRuntimeError):
    """A call of the driver that failed, with the driver's own words."""


class Gpu:
    """The first GPU that this process may see.

    Addresses are device addresses as integers. All copies are ordered on `stream`.

    Raises MissingRuntimeError where there is no driver or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._cuda = C.CDLL(LIBRARY)
        except OSError as error:
            raise MissingRuntimeError(f"no NVIDIA driver is here ({LIBRARY})", "install the GPU's driver") from error
        device, context, stream = C.c_int(), C.c_void_p(), C.c_void_p()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGet", C.byref(device), 0)
            self._call("cuDevicePrimaryCtxRetain", C.byref(context), device)
        except CudaError as error:
            raise MissingRuntimeError(f"no usable NVIDIA GPU is here ({error})", _HINT) from error
        self._device, self._context = device, context
        self.activate()
        self._call("cuStreamCreate", C.byref(stream), _NON_BLOCKING)
        self._stream = stream
        self.name, self.capability = self._read_name(), f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"

    @property
    def stream(self) -> int:
        """The stream's handle, as other libraries take it."""
        return int(self._stream.value or 0)

    def activate(self) -> None:
        """Make this GPU the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Device memory that nobody holds."""
        free, total = C.c_size_t(), C.c_size_t()
        self._call("cuMemGetInfo_v2", C.byref(free), C.byref(total))
        return int(free.value)

    def allocate(self, count: int) -> int:
        """A new buffer of so many bytes; ResourceError where the GPU's memory is full."""
        address = C.c_uint64()
        self._call("cuMemAlloc_v2", C.byref(address), C.c_size_t(max(count, 1)))
        return int(address.value)

    def release(self, address: int) -> None:
        """Give a buffer back."""
        self._call("cuMemFree_v2", C.c_uint64(address))

    def upload(self, address: int, values: NDArray) -> None:
        """Copy an array to a buffer."""
        self._copy("cuMemcpyHtoDAsync_v2", C.c_uint64(address), values.ctypes.data_as(C.c_void_p), values.nbytes)

    def download(self, address: int, values: NDArray) -> None:
        """Copy a buffer into an array."""
        self._copy("cuMemcpyDtoHAsync_v2", values.ctypes.data_as(C.c_void_p), C.c_uint64(address), values.nbytes)

    def copy(self, target: int, source: int, count: int) -> None:
        """Copy bytes from one buffer to another."""
        self._copy("cuMemcpyDtoDAsync_v2", C.c_uint64(target), C.c_uint64(source), count)

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Give the stream and the context back."""
        with suppress(CudaError):  # after some failures the driver refuses everything
            self._call("cuStreamDestroy_v2", self._stream)
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _copy(self, name: str, target: Any, source: Any, count: int) -> None:
        if count:
            self._call(name, target, source, C.c_size_t(count), self._stream)
            self.synchronize()

    def _attribute(self, which: int) -> int:
        value = C.c_int()
        self._call("cuDeviceGetAttribute", C.byref(value), which, self._device)
        return value.value

    def _read_name(self) -> str:
        text = C.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode("utf-8", "replace")

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._cuda, name)(*arguments))
        if code == _OUT_OF_MEMORY:
            raise ResourceError("the GPU's memory is full", GPU_HINT)
        if code:
            raise CudaError(f"{name}: {self._words(code)}", _HINT)

    def _words(self, code: int) -> str:
        text = C.c_char_p()
        known = self._cuda.cuGetErrorString(code, C.byref(text)) == 0 and text.value
        return text.value.decode() if known and text.value else f"error {code}"
