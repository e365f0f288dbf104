"""GGUF files in llama.cpp, called through its C interface; needs numpy alone.

The session is here, the C library in `interface`, llama.cpp's own tokenizer in `tokenizer`.
"""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.processors import thread_count
from qwen3_export.run.llamacpp.interface import PINNED, LlamaBatch, errors, failure, library, opened
from qwen3_export.run.llamacpp.tokenizer import LlamaTokenizer, header_value
from qwen3_export.run.session import RuntimeOptions, check_ids

_BATCH = 512
# Logits of one batch at the vocabulary of real Qwen3 models must stay a small share of the memory.
_LOGITS_BYTES = 64 << 20
_TYPE_F32 = 0
_MMAP = 1
_FLASH_OFF = 0


class LlamaSession:
    """A GGUF file opened in llama.cpp; see `run.session.Session`.

    With `exact` the cache is fp32 and flash attention is off. Raises InputError when llama.cpp refuses the file.
    """

    runtime = "llama.cpp"
    device = "cpu"
    version = PINNED

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        self._lib, self._path = library(), path
        self._model = self._context = None
        self.threads = thread_count(options.threads)
        self._load()
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        trained = self._lib.llama_model_n_ctx_train(self._model)
        self.context = min(options.context or 4096, trained)
        self._batch = max(1, min(_BATCH, self.context, _LOGITS_BYTES // (4 * self.vocab_size)))
        self._open_context(options.exact)
        self._arrays = _BatchArrays(self._batch)
        self._length = 0

    def _load(self) -> None:
        parameters = self._lib.llama_model_default_params()
        parameters.n_gpu_layers, parameters.load_mode = 0, _MMAP
        parameters.use_extra_bufts, parameters.check_tensors = False, True
        errors.clear()
        opened[:] = [self._path]
        self._model = self._lib.llama_model_load_from_file(os.fsencode(self._path), parameters)
        if not self._model:
            raise failure(f"{self._path}: llama.cpp cannot load it")

    def _open_context(self, exact: bool) -> None:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = self.context, self._batch, self._batch
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = self._batch
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.op_offload = parameters.offload_kqv = False
        if exact:
            parameters.type_k = parameters.type_v = _TYPE_F32
            parameters.flash_attn_type = _FLASH_OFF
        errors.clear()
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            error = failure(f"{self._path}: llama.cpp cannot open a context of {self.context}")
            self.close()
            raise error

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Start a new sequence; logits `[len(ids), vocab]`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0
        return np.concatenate([self._run(ids[i : i + self._batch]) for i in range(0, len(ids), self._batch)])

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits `[vocab]`."""
        return self._run(np.array([token], np.int32))[0]

    def _run(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        count = len(ids)
        check_ids(self, self._path, ids, self._length)
        errors.clear()
        status = self._lib.llama_decode(self._context, self._arrays.fill(ids, self._length))
        if status:
            raise failure(f"{self._path}: llama.cpp failed with status {status}")
        self._length += count
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (count, self.vocab_size)).copy()

    @property
    def tokenizer(self) -> LlamaTokenizer:
        """llama.cpp's own tokenizer, from the file's vocabulary."""
        return LlamaTokenizer(self._lib, self._model, self.vocab_size)

    def metadata(self, key: str) -> str | None:
        """A value of the file's header as text, None when there is none."""
        return header_value(self._lib, self._model, key)

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


class _BatchArrays:
    """Memory of one batch, reused: tokens, positions, one sequence id, logits wanted for all."""

    def __init__(self, size: int) -> None:
        self._tokens, self._positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._counts, self._wanted = np.ones(size, np.int32), np.ones(size, np.int8)
        self._sequence = C.c_int32(0)
        self._sequences = (C.c_void_p * size)(*[C.addressof(self._sequence)] * size)

    def fill(self, ids: NDArray[np.int32], begin: int) -> LlamaBatch:
        count = len(ids)
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(begin, begin + count)
        return LlamaBatch(
            count,
            self._tokens.ctypes.data,
            None,
            self._positions.ctypes.data,
            self._counts.ctypes.data,
            C.addressof(self._sequences),
            self._wanted.ctypes.data,
        )
