"""ONNX folders in ONNX Runtime, with the cache kept in the runtime's own buffers. Needs numpy alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.run.session import RuntimeOptions

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OrtSession:
    """See `run.session.Session`. `exact`: codes under Q/DQ are multiplied with fp32 activations too.

    A TensorRT folder is opened by its ONNX, and says so: the plan itself needs a GPU.
    """

    runtime = "onnxruntime"
    device = "cpu"

    def __init__(self, folder: Path, options: RuntimeOptions) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingRuntimeError(
                f"{folder}: running an ONNX folder needs onnxruntime", "pip install 'qwen3-export[ort]'"
            ) from error
        self.version = onnxruntime.__version__
        self.threads = options.threads or len(os.sched_getaffinity(0))
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
        self._empty = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self._past.items()}
        self._cache: dict[str, Any] = {}
        self._length = 0

    def _read_signature(self, folder: Path) -> None:
        outputs = {item.name: item for item in self._session.get_outputs()}
        self._outputs = list(outputs)
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
        context = self._session.get_modelmeta().custom_metadata_map.get("qwen3_export.context")
        self.context = int(context) if context else 2**31

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Start a new sequence; logits `[len(ids), vocab]`."""
        self._cache, self._length = dict(self._empty), 0
        return self._run(ids)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits `[vocab]`."""
        return self._run(np.array([token]))[0]

    def _run(self, ids: NDArray) -> NDArray[np.float32]:
        count = len(ids)
        total = self._length + count
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids.astype(np.int64)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(self._length, total, dtype=np.int64)[None])
        for name, value in self._cache.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._cache = {name: results[name.replace("past_key_values", "present")] for name in self._past}
        self._length = total
        return results["logits"].numpy()[0].astype(np.float32, copy=False)

    def close(self) -> None:
        """Free the model."""
        del self._session
