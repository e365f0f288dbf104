"""Where an artifact runs: `--device`.

    cpu     ONNX Runtime's own kernels, llama.cpp, torch
    cuda    ONNX Runtime's CUDAExecutionProvider
    rtx     ONNX Runtime's NvTensorRTRTXExecutionProvider, a plugin of its own
    plan    a TensorRT folder's plan in TensorRT itself

Left away, a TensorRT folder's plan runs where its GPU and runtime are, and everything else on the processor. A device
that was asked for and is not there is an error: nothing falls back to the processor in silence.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_export.core.process import uninterrupted
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.run.ort_words import reason_of

DEVICES = ("cpu", "cuda", "rtx", "plan")
# Operators that read weights or a cache have one of these in their name: where they run is where the model runs.
_HEAVY = ("MatMul", "Gemm", "Attention", "MoE")


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    It has the place of its buffers, its plugin's module, and the remedy without it.
    """

    name: str
    memory: str
    install: str
    plugin: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


PROVIDERS = {
    "cuda": Provider(
        "CUDAExecutionProvider",
        "cuda",
        "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'",
        # The cache grows by doubling already: the arena need not add to it.
        options={"device_id": "0", "arena_extend_strategy": "kSameAsRequested"},
    ),
    "rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "cuda",
        "pip install onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
    ),
}


def check_device(name: str | None) -> None:
    """Raise InputError for a device that there is not."""
    if name is not None and name not in DEVICES:
        raise InputError(f"--device {name}: one of {', '.join(DEVICES)} was expected")


def find_provider(device: str) -> Provider:
    """The provider of `cuda` or `rtx`.

    Raises MissingRuntimeError, with the remedy, where the installed ONNX Runtime has none.
    """
    provider = PROVIDERS[device]
    onnxruntime = _onnxruntime()
    has_plugin = provider.plugin is not None and importlib.util.find_spec(provider.plugin) is not None
    if provider.name not in onnxruntime.get_available_providers() and not has_plugin:
        found = ", ".join(onnxruntime.get_available_providers())
        raise MissingRuntimeError(
            f"--device {device} needs {provider.name}, onnxruntime {onnxruntime.__version__} here has {found}",
            provider.install,
        )
    return provider


def open_on(provider: Provider, graph: Any, settings: Any, where: Path) -> Any:
    """An InferenceSession on a provider.

    Raises MissingRuntimeError where the provider has no device, or leaves products or attention to the processor.
    """
    onnxruntime = _onnxruntime()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Errors of loading are logged by nobody's session, in colours.
    onnxruntime.set_default_logger_severity(4)
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        raise MissingRuntimeError(
            f"onnxruntime {onnxruntime.__version__} does not tell which operators run where, 1.24 or later does",
            provider.install,
        )
    if provider.name in onnxruntime.get_available_providers():
        _load_cuda(onnxruntime)
        named = [(provider.name, dict(provider.options)), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(graph, settings, providers=named)
    else:
        settings.add_provider_for_devices(_plugin_devices(onnxruntime, provider), dict(provider.options))
        session = onnxruntime.InferenceSession(graph, settings)
    if provider.name not in session.get_providers():
        raise MissingRuntimeError(
            f"{where}: {provider.name} finds no GPU that it can use, or lacks CUDA's libraries",
            "see what nvidia-smi says; pip install 'onnxruntime-gpu[cuda,cudnn]' brings the libraries",
        )
    session.disable_fallback()
    _check_assignment(session, provider, where)
    return session


def _load_cuda(onnxruntime: Any) -> None:
    """Load CUDA's libraries where pip has put them.

    ONNX Runtime does not do so by itself, and prints what it does not find.
    """
    if (load := getattr(onnxruntime, "preload_dlls", None)) is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            load()


def _plugin_devices(onnxruntime: Any, provider: Provider) -> list[Any]:
    """The devices of a provider that comes as a plugin, registered first."""
    assert provider.plugin is not None
    known = {device.ep_name for device in onnxruntime.get_ep_devices()}
    if provider.name not in known:
        try:
            library = importlib.import_module(provider.plugin).get_library_path()
            onnxruntime.register_execution_provider_library(provider.name, library)
        except Exception as error:  # onnxruntime's errors share no public base below Exception
            reason = reason_of(error)
            raise MissingRuntimeError(
                f"{provider.name} cannot be loaded ({reason})", "it needs an RTX GPU and its driver"
            ) from error
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider.name]
    if not found:
        raise MissingRuntimeError(f"{provider.name} finds no GPU that it can use", "see what nvidia-smi says")
    return found[:1]


def _check_assignment(session: Any, provider: Provider, where: Path) -> None:
    """Products and attention must run on the provider.

    Shapes and indices may stay on the processor.
    """
    left = set()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != provider.name:
            kinds = {node.op_type for node in part.get_nodes()}
            left |= {kind for kind in kinds if any(word in kind for word in _HEAVY)}
    if left:
        raise MissingRuntimeError(
            f"{where}: {provider.name} has no kernels for {', '.join(sorted(left))}, which would run on the processor",
            "export with `--target cuda` for cuda, with `--target standard --precision fp16` or `tensorrt` for rtx",
        )


def _onnxruntime() -> Any:
    try:
        with uninterrupted():
            return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingRuntimeError("running an ONNX folder needs onnxruntime", "pip install onnxruntime") from error
