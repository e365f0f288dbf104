"""ONNX folders in ONNX Runtime. Needs numpy alone.

`GroupQueryAttention` appends to its cache in place when past and present are the same buffer, so a
decoded token costs no copy of what came before; the buffer doubles when it is full. A folder in
standard operators returns a longer cache each time, which becomes the next past. On a GPU (`--device`) caches stay in
its memory; token ids go there, logits come back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.memory import lacks_memory, out_of_memory
from qwen3_export.core.plan_folder import ENGINE
from qwen3_export.core.process import uninterrupted
from qwen3_export.core.processors import thread_count
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError
from qwen3_export.run.devices import PROVIDERS, find_provider, open_on
from qwen3_export.run.exact_graph import exact_graph, kernels
from qwen3_export.run.onnx_files import OnnxFiles, find_onnx
from qwen3_export.run.ort_settings import session_settings
from qwen3_export.run.ort_words import reason_of
from qwen3_export.run.session import RuntimeOptions, check_ids
from qwen3_export.run.signature import read_signature

_SMALLEST_CACHE = 256
# Tokens that try out an order of caches, and how far logits may be apart, as a share of their range.
_TRIED, _ALIKE = 12, 0.02
# What errors of a GPU's libraries have in their text.
_OF_THE_DRIVER, _SMI = ("CUDA", "CUBLAS", "CUDNN"), "see what nvidia-smi says"
_PLAN_ALONE = "run the plan on its GPU; here, the folder that it was exported from has the same numbers"


def onnxruntime_for(folder: Path) -> Any:
    """The module `onnxruntime`, which a folder needs; MissingRuntimeError without it."""
    try:
        with uninterrupted():
            import onnxruntime
    except ImportError as error:
        raise MissingRuntimeError(
            f"{folder}: running an ONNX folder needs onnxruntime", "pip install 'qwen3-export[ort]'"
        ) from error
    return onnxruntime


class OrtSession:
    """See `run.session.Session`. `exact`: all codes are multiplied with activations that nothing has rounded.

    A TensorRT folder is opened by its ONNX, and says so: the plan itself needs its GPU (`run.tensorrt`).
    """

    runtime = "onnxruntime"
    device = "cpu"
    # Of a TensorRT folder: why its plan is not what runs.
    plan_not_run: str | None = None
    _memory = "cpu"

    def __init__(self, artifact: Path, options: RuntimeOptions) -> None:
        files = find_onnx(artifact)
        folder = files.folder
        onnxruntime = onnxruntime_for(folder)
        self.version, self._folder = onnxruntime.__version__, folder
        self._values = onnxruntime.OrtValue
        provider = find_provider(options.device) if options.device in PROVIDERS else None
        self.threads = thread_count(options.threads)
        if of_plan := (folder / ENGINE).is_file():
            self.runtime = "onnxruntime (the plan's ONNX)"
        settings = session_settings(onnxruntime, files.graph, self.threads, options.exact or of_plan, options.exact)
        try:
            graph = exact_graph(files.graph) if options.exact else str(files.graph)
            if provider is None:
                with kernels(graph, options.exact):
                    self._session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
            else:
                self._session = open_on(provider, graph, settings, folder)
                self.device, self._memory = str(options.device), provider.memory
        except ExportError:
            raise
        except Exception as error:  # onnxruntime's errors share no public base below Exception
            if lacks_memory(error):
                raise out_of_memory(folder, error) from error
            reason = reason_of(error)
            if "NOT_IMPLEMENTED" in str(error) or (of_plan and "is not a registered function/op" in reason):
                raise MissingRuntimeError(
                    f"{folder}: ONNX Runtime has no kernel for it on this device ({reason})",
                    _PLAN_ALONE if of_plan else "export with --precision fp32, or run it where bf16 is supported",
                ) from error
            raise InputError(
                f"{files.graph}: ONNX Runtime cannot load it ({reason})",
                "a damaged or incomplete file: export it again, or download it again",
            ) from error
        self._read_signature(files)
        self._binding = self._session.io_binding()
        self._length = self._capacity = 0
        self._cache: dict[str, Any] = {}
        if self.in_place:
            self._grow(_SMALLEST_CACHE)
        self._check_order()

    def _read_signature(self, files: OnnxFiles) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.signature = read_signature(files.graph, inputs, outputs, files.decoder)
        metadata = self._session.get_modelmeta().custom_metadata_map
        stated = metadata.get("qwen3_export.context", "")
        self.context = int(stated) if stated.isdigit() else files.context or 2**31
        # What other tools wrote says in its genai_config.json whether its cache may be written in place.
        self.is_ours = metadata.get("qwen3_export.flavor") == "ort"
        self.in_place = self.is_ours or ("qwen3_export.flavor" not in metadata and files.shares_cache)
        self._past = {cache.past: cache for cache in self.signature.caches}
        self.vocab_size = self.signature.vocab_size or self._tried_vocab_size()

    def _tried_vocab_size(self) -> int:
        """The last axis of the logits, found by running one token.

        The graph may leave it open.
        """
        feeds = self.signature.feeds(np.zeros(1, np.int64), 0)
        feeds.update({cache.past: np.zeros(cache.shape, cache.dtype) for cache in self.signature.caches})
        return int(self._session.run([self.signature.logits], feeds)[0].shape[-1])

    def _check_order(self) -> None:
        """Refuse caches whose order, by which they were matched, is wrong.

        A decoded token's logits show it.
        """
        if self.signature.named or self.context < _TRIED:
            return
        ids = np.arange(_TRIED, dtype=np.int32) % self.vocab_size
        at_once = self.prefill(ids)[-1]
        self.prefill(ids[:-1])
        decoded = self.decode(int(ids[-1]))
        if np.abs(at_once - decoded).max() > _ALIKE * np.ptp(at_once):
            raise InputError(
                f"{self._folder}: its caches are named without layers, and not in one order among inputs and outputs",
                "export it with names such as past_key_values.0.key and present.0.key",
            )

    def _grow(self, capacity: int) -> None:
        """Buffers for at least `capacity` positions, bound as past and present alike."""
        self._capacity = max(capacity, 2 * self._capacity)
        for name, cache in self._past.items():
            buffer = np.zeros((1, cache.shape[1], self._capacity, cache.shape[3]), cache.dtype)
            if self._length:
                buffer[:, :, : self._length] = self._values_of(name)[:, :, : self._length]
            if self._on_device:
                self._cache[name] = self._values.ortvalue_from_numpy(buffer, self._memory, 0)
                self._binding.bind_ortvalue_input(name, self._cache[name])
                self._binding.bind_ortvalue_output(cache.present, self._cache[name])
                continue
            self._cache[name] = buffer
            place = ("cpu", 0, cache.dtype, buffer.shape, buffer.ctypes.data)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(cache.present, *place)

    @property
    def _on_device(self) -> bool:
        return self.device != "cpu"

    def _values_of(self, name: str) -> NDArray:
        """A cache in this machine's memory."""
        value = self._cache[name]
        return value if isinstance(value, np.ndarray) else value.numpy()

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Start a new sequence; logits `[len(ids), vocab]`."""
        self._length = 0
        if not self.in_place:
            self._cache = {name: np.zeros(cache.shape, cache.dtype) for name, cache in self._past.items()}
        return self._run(ids)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits `[vocab]`."""
        return self._run(np.array([token]))[0]

    def _run(self, ids: NDArray) -> NDArray[np.float32]:
        check_ids(self, self._folder, ids, self._length)
        total, binding = self._length + len(ids), self._binding
        if self.in_place and total > self._capacity:
            self._grow(total)
        for name, values in self.signature.feeds(ids, self._length).items():
            binding.bind_cpu_input(name, values)
        if not self.in_place:
            self._bind_moving()
        # Outputs come back in the order in which they were first bound: the caches, then the logits.
        binding.bind_output(self.signature.logits)
        self.run_bound(binding)
        *presents, logits = binding.get_outputs()
        if not self.in_place:
            self._cache = dict(zip(self._past, presents, strict=True))
        self._length = total
        found: NDArray = logits.numpy()[0]
        if found.shape != (len(ids), self.vocab_size):
            raise InputError(
                f"{self._folder}: logits {list(found.shape)} for {len(ids)} tokens and {self.vocab_size} words",
                "export the model with logits of every position",
            )
        return found.astype(np.float32, copy=False)

    def _bind_moving(self) -> None:
        """The last present as past, and a new present of the runtime's own."""
        for name, value in self._cache.items():
            if isinstance(value, np.ndarray):
                self._binding.bind_cpu_input(name, value)
            else:
                self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_output(self._past[name].present, self._memory)

    def new_binding(self) -> Any:
        """A binding of its own, for whoever keeps other caches for the same model."""
        return self._session.io_binding()

    def run_bound(self, binding: Any) -> None:
        """Run the model on what is bound."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no public base below Exception
            if lacks_memory(error):
                raise out_of_memory(self._folder, error) from error
            reason = reason_of(error)
            if self._on_device and any(word in str(error) for word in _OF_THE_DRIVER):
                raise MissingRuntimeError(f"{self._folder}: {self.device} failed ({reason})", _SMI) from error
            raise InputError(f"{self._folder}: ONNX Runtime cannot run it ({reason})") from error

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape `[1, kv_heads, 0, head_dim]` and dtype of every past, by input name."""
        return {name: (cache.shape, cache.dtype) for name, cache in self._past.items()}

    def cache_values(self) -> dict[str, NDArray]:
        """The sequence's cache by input name, where it is written in place.

        Positions past its end are unused.
        """
        return {name: self._values_of(name) for name in self._cache}

    def close(self) -> None:
        """Free the model."""
        del self._binding, self._session
