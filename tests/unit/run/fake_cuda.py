"""A fake `libcuda.so.1` in host memory, as strict as the driver's documentation.

    stream            what is enqueued runs at cuStreamSynchronize, in order, and not before
    memory            new buffers hold NaN; an address counts only inside of a live buffer
    threads           every call but those that find a GPU needs a current context in its own thread
    failed kernels    what reads or writes beyond its buffers breaks the context: all later calls fail

https://docs.nvidia.com/cuda/cuda-driver-api
"""

from __future__ import annotations

import ctypes as C
import itertools
import threading
from collections.abc import Callable
from typing import Any

INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, INVALID_CONTEXT, INVALID_HANDLE, ILLEGAL_ADDRESS = 1, 2, 100, 201, 400, 700
WORDS = {
    INVALID_VALUE: b"invalid argument",
    NO_DEVICE: b"no CUDA-capable device is detected",
    INVALID_CONTEXT: b"invalid device context",
    INVALID_HANDLE: b"invalid resource handle",
    ILLEGAL_ADDRESS: b"an illegal memory access was encountered",
}
_CONTEXT, _STREAM, _ALIGNED, _UNWRITTEN = 0xC0, 0x57, 256, 0xFF


class IllegalAccess(Exception):
    """A kernel that touched memory which is not its own."""


class FakeDriver:
    """One GPU with `room` bytes. Arguments must have the C types of the driver's functions."""

    def __init__(self, capability: str = "8.9", name: str = "Fake RTX", room: int = 1 << 30, devices: int = 1) -> None:
        self.capability, self.name, self.room, self.devices = capability, name, room, devices
        self.buffers: dict[int, bytearray] = {}
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.retained, self.streams = 0, set[int]()
        self._queue: list[tuple[Callable[[], None], list[int]]] = []
        self._addresses = itertools.count(1 << 32, 1 << 32)
        self._current, self._broken = threading.local(), 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is no function of the driver that this fake has")

    def bytes_at(self, address: int, count: int) -> memoryview:
        """Device memory; IllegalAccess where it is not all inside of one live buffer."""
        for start, buffer in self.buffers.items():
            if start <= address and address + count <= start + len(buffer):
                return memoryview(buffer)[address - start : address - start + count]
        raise IllegalAccess(f"{count} bytes at {address:#x}")

    def enqueue(self, stream: int, work: Callable[[], None], addresses: list[int]) -> None:
        """Work for later, and the addresses that must stay what they are until then."""
        assert stream in self.streams, "no stream of this driver"
        self._queue.append((work, addresses))

    def cuInit(self, flags: int) -> int:
        return 0 if flags == 0 else INVALID_VALUE

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = WORDS.get(code)
        return 0 if code in WORDS else INVALID_VALUE

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0 if number < self.devices else NO_DEVICE

    def cuDeviceGetName(self, text: Any, size: int, device: C.c_int) -> int:
        assert device.value < self.devices
        text.value = self.name.encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: C.c_int) -> int:
        assert device.value < self.devices
        value._obj.value = int(self.capability.split(".")[{75: 0, 76: 1}[attribute]])
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: C.c_int) -> int:
        assert isinstance(device, C.c_int)
        self.retained += 1
        context._obj.value = _CONTEXT
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: C.c_int) -> int:
        assert self.retained > 0, "released more often than retained"
        self.retained -= 1
        if not self.retained:
            self.buffers.clear()
        return 0

    def cuCtxSetCurrent(self, context: C.c_void_p) -> int:
        assert context.value == _CONTEXT
        self._current.context = context.value if self.retained else None
        return self._broken

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        if code := self._unfit():
            return code
        stream._obj.value = _STREAM + len(self.streams)
        self.streams.add(stream._obj.value)
        return 0 if flags in (0, 1) else INVALID_VALUE

    def cuStreamDestroy_v2(self, stream: C.c_void_p) -> int:
        if code := self._unfit(stream):
            return code
        self.streams.remove(stream.value)
        return 0

    def cuStreamSynchronize(self, stream: C.c_void_p) -> int:
        if code := self._unfit(stream):
            return code
        queue, self._queue = self._queue, []
        for work, _ in queue:
            try:
                work()
            except IllegalAccess:
                self._broken = ILLEGAL_ADDRESS
                return self._broken
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self._free(), self.room
        return self._unfit()

    def cuMemAlloc_v2(self, address: Any, count: C.c_size_t) -> int:
        if code := self._unfit():
            return code
        if not count.value:
            return INVALID_VALUE
        if count.value > self._free():
            return OUT_OF_MEMORY
        address._obj.value = next(self._addresses)
        self.buffers[address._obj.value] = bytearray([_UNWRITTEN]) * count.value
        return 0

    def cuMemFree_v2(self, address: C.c_uint64) -> int:
        assert isinstance(address, C.c_uint64)
        if code := self._unfit():
            return code
        held = {place for _, addresses in self._queue for place in addresses}
        assert address.value not in held, "released while work on it was enqueued"
        return 0 if self.buffers.pop(address.value, None) is not None else INVALID_VALUE

    def cuMemcpyHtoDAsync_v2(self, target: C.c_uint64, source: C.c_void_p, count: C.c_size_t, stream: Any) -> int:
        assert (type(target), type(source)) == (C.c_uint64, C.c_void_p)
        self.uploads.append(count.value)

        def work() -> None:
            self.bytes_at(target.value, count.value)[:] = C.string_at(source.value or 0, count.value)

        return self._copy(work, [target.value], count, stream)

    def cuMemcpyDtoHAsync_v2(self, target: C.c_void_p, source: C.c_uint64, count: C.c_size_t, stream: Any) -> int:
        assert (type(target), type(source)) == (C.c_void_p, C.c_uint64)
        self.downloads.append(count.value)

        def work() -> None:
            C.memmove(target.value or 0, bytes(self.bytes_at(source.value, count.value)), count.value)

        return self._copy(work, [source.value], count, stream)

    def cuMemcpyDtoDAsync_v2(self, target: C.c_uint64, source: C.c_uint64, count: C.c_size_t, stream: Any) -> int:
        assert (type(target), type(source)) == (C.c_uint64, C.c_uint64)

        def work() -> None:
            self.bytes_at(target.value, count.value)[:] = bytes(self.bytes_at(source.value, count.value))

        return self._copy(work, [target.value, source.value], count, stream)

    def _copy(self, work: Callable[[], None], addresses: list[int], count: C.c_size_t, stream: C.c_void_p) -> int:
        if code := self._unfit(stream):
            return code
        try:
            for address in addresses:
                self.bytes_at(address, count.value)
        except IllegalAccess:
            return INVALID_VALUE
        self.enqueue(int(stream.value or 0), work, addresses)
        return 0

    def _unfit(self, stream: C.c_void_p | None = None) -> int:
        """Why no call can be answered now, 0 where it can."""
        if self._broken:
            return self._broken
        if getattr(self._current, "context", None) is None:
            return INVALID_CONTEXT
        return 0 if stream is None or stream.value in self.streams else INVALID_HANDLE

    def _free(self) -> int:
        return self.room - sum(map(len, self.buffers.values()))


def nothing_is_held(driver: FakeDriver) -> bool:
    """Whether all buffers, streams and contexts were given back."""
    return not driver.buffers and not driver.streams and not driver.retained
