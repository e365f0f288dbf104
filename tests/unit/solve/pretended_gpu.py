"""A GPU for machines without one: tensors on the CPU that are told apart as if some lay on a GPU.

What mixes both kinds, or reads a GPU's memory as an array, fails as it does with CUDA. Results are those of the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import thread
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
_MARK = "pretended_on_gpu"
# A CPU's index may choose from a GPU's tensor, and these copy from one to the other.
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
_COPIES = {Tensor.copy_}
_PROPERTIES = {
    Tensor.device.__get__: lambda on: GPU if on else torch.device("cpu"),  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda on: on,  # type: ignore[attr-defined]
}


def on_gpu(tensor: Tensor) -> bool:
    return getattr(tensor, _MARK, False)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes | torch.Size):
        for item in value:
            yield from tensors_in(item)


def marked(value: Any, on: bool) -> Any:
    """The same with every tensor in it on the GPU, or none."""
    if isinstance(value, Tensor):
        if on_gpu(value) != on:
            setattr(value, _MARK, on)
        return value
    if isinstance(value, tuple | list):
        for item in value:
            marked(item, on)
    return value


class PretendedGpu(TorchFunctionMode):
    """While it is entered, `cuda` is a device."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _PROPERTIES:
            return _PROPERTIES[func](on_gpu(args[0]))
        if func in _MOVES:
            return self._moved(func, args, kwargs)
        given = list(tensors_in((args, kwargs)))
        on = any(map(on_gpu, given))
        if func is Tensor.numpy and on:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if "device" in kwargs and kwargs["device"] is not None:
            on, kwargs["device"] = torch.device(kwargs["device"]).type == "cuda", "cpu"
        elif func not in _COPIES:
            self._check(func, args, given)
        out = func(*args, **kwargs)
        if func in _COPIES or func is Tensor.__setitem__:
            return out
        return marked(out, on)

    def _check(self, func: Callable, args: Any, given: list[Tensor]) -> None:
        if func in _INDEXING:
            given = [args[0], *tensors_in(args[2:])]
        gpu = [tensor for tensor in given if on_gpu(tensor)]
        cpu = [tensor for tensor in given if not on_gpu(tensor) and tensor.dim()]
        if gpu and cpu:
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device, found cuda and cpu")

    def _moved(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, rest, on = args[0], [], on_gpu(args[0])
        if func is not Tensor.to:
            on = func is Tensor.cuda
            return marked(tensor.view_as(tensor), on) if on != on_gpu(tensor) else tensor
        for value in args[1:]:
            if isinstance(value, str | torch.device):
                on = torch.device(value).type == "cuda"
            elif isinstance(value, Tensor):
                on = on_gpu(value)
                rest.append(value.dtype)
            else:
                rest.append(value)
        if (device := kwargs.pop("device", None)) is not None:
            on = torch.device(device).type == "cuda"
        out = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if out is tensor and on != on_gpu(tensor):
            out = tensor.view_as(tensor)
        return marked(out, on)


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`--device cuda` works inside, in every thread."""
    run = thread._WorkItem.run  # type: ignore[attr-defined]

    @functools.wraps(run)
    def within(item: Any, *args: Any) -> Any:
        with PretendedGpu():
            return run(item, *args)

    monkeypatch.setattr(thread._WorkItem, "run", within)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (8 << 30, 8 << 30))
    with PretendedGpu():
        yield
