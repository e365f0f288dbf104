"""ONNX folders in ONNX Runtime. Needs numpy alone.

`GroupQueryAttention` appends to its cache in place when past and present are the same buffer, so a
decoded token costs no copy of what came before; the buffer doubles when it is full. A folder in
standard operators returns a longer cache each time, which becomes the next past.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.process import uninterrupted
from qwen3_export.core.processors import thread_count
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.run.session import RuntimeOptions, check_ids

_SMALLEST_CACHE = 256
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OrtSession:
    """See `run.session.Session`. `exact`: codes under Q/DQ are multiplied with fp32 activations too.

    A TensorRT folder is opened by its ONNX, and says so: the plan itself needs a GPU.
    """

    runtime = "onnxruntime"
    device = "cpu"

    def __init__(self, folder: Path, options: RuntimeOptions) -> None:
        try:
            with uninterrupted():
                import onnxruntime
        except ImportError as error:
            raise MissingRuntimeError(
                f"{folder}: running an ONNX folder needs onnxruntime", "pip install 'qwen3-export[ort]'"
            ) from error
        self.version, self._folder = onnxruntime.__version__, folder
        self.threads = thread_count(options.threads)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self.threads
        settings.log_severity_level = 4
        if (folder / "engine.json").is_file():
            self.runtime = "onnxruntime (the plan's ONNX)"
        if options.exact or self.runtime != OrtSession.runtime:
            settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no public base below Exception
            reason = str(error).strip().splitlines()[0]
            if "NOT_IMPLEMENTED" in reason:
                raise MissingRuntimeError(
                    f"{folder}: ONNX Runtime has no kernel for it on this device ({reason})",
                    "export with --precision fp32, or run it where bf16 is supported",
                ) from error
            raise InputError(f"{folder}: ONNX Runtime cannot load model.onnx ({reason})") from error
        self._read_signature(folder)
        self._binding = self._session.io_binding()
        self._length = self._capacity = 0
        self._cache: dict[str, Any] = {}
        if self.in_place:
            self._grow(_SMALLEST_CACHE)

    def _read_signature(self, folder: Path) -> None:
        outputs = {item.name: item for item in self._session.get_outputs()}
        self._past: dict[str, tuple[tuple[int, ...], Any]] = {}
        for item in self._session.get_inputs():
            if item.name.startswith("past_key_values."):
                if item.type not in _TYPES:
                    raise MissingRuntimeError(
                        f"{folder}: a {item.type} cache cannot be fed to ONNX Runtime on this device"
                    )
                shape = (1, item.shape[1], 0, item.shape[3])
                self._past[item.name] = (shape, _TYPES[item.type])
        self.vocab_size = int(outputs["logits"].shape[-1])
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.context = int(metadata.get("qwen3_export.context", 2**31))
        self.in_place = metadata.get("qwen3_export.flavor") == "ort"

    def _grow(self, capacity: int) -> None:
        """Buffers for at least `capacity` positions, bound as past and present alike."""
        self._capacity = max(capacity, 2 * self._capacity)
        for name, (shape, dtype) in self._past.items():
            buffer = np.zeros((1, shape[1], self._capacity, shape[3]), dtype)
            if self._length:
                buffer[:, :, : self._length] = self._cache[name][:, :, : self._length]
            self._cache[name] = buffer
            place = ("cpu", 0, dtype, buffer.shape, buffer.ctypes.data)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(name.replace("past_key_values", "present"), *place)

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Start a new sequence; logits `[len(ids), vocab]`."""
        self._length = 0
        if not self.in_place:
            self._cache = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._past.items()}
        return self._run(ids)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits `[vocab]`."""
        return self._run(np.array([token]))[0]

    def _run(self, ids: NDArray) -> NDArray[np.float32]:
        check_ids(self, self._folder, ids, self._length)
        total, binding = self._length + len(ids), self._binding
        if self.in_place and total > self._capacity:
            self._grow(total)
        binding.bind_cpu_input("input_ids", ids.astype(np.int64)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(self._length, total, dtype=np.int64)[None])
        if not self.in_place:
            self._bind_moving()
        # Outputs come back in the order in which they were first bound: the caches, then the logits.
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        *presents, logits = binding.get_outputs()
        if not self.in_place:
            self._cache = dict(zip(self._past, presents, strict=True))
        self._length = total
        return logits.numpy()[0].astype(np.float32, copy=False)

    def _bind_moving(self) -> None:
        """The last present as past, and a new present of the runtime's own."""
        for name, value in self._cache.items():
            if isinstance(value, np.ndarray):
                self._binding.bind_cpu_input(name, value)
            else:
                self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_output(name.replace("past_key_values", "present"))

    def new_binding(self) -> Any:
        """A binding of its own, for whoever keeps other caches for the same model."""
        return self._session.io_binding()

    def run_bound(self, binding: Any) -> None:
        """Run the model on what is bound."""
        self._session.run_with_iobinding(binding)

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape `[1, kv_heads, 0, head_dim]` and dtype of every past, by input name."""
        return dict(self._past)

    def cache_values(self) -> dict[str, NDArray]:
        """The sequence's cache by input name, where it is written in place; positions past its end are unused."""
        return dict(self._cache)

    def close(self) -> None:
        """Free the model."""
        del self._binding, self._session
