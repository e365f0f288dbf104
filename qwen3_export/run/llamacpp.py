"""GGUF files in llama.cpp, through its C interface.

The library lies inside the `xllamacpp` wheel.

The wheel is prebuilt for a fixed instruction set (AVX2), so it runs the same on every x86-64
machine; its own Python classes give no logits of every position, its C symbols do. Their structures
belong to one build: the version is pinned, and the library's default parameters are compared with
what this file expects before anything else is called. Needs numpy alone.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.processors import thread_count
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.run.session import RuntimeOptions, check_ids

PINNED = "2026.10.11549"
_INSTALL = "pip install 'qwen3-export[llamacpp]'"
_BATCH = 512
# Logits of one batch at the vocabulary of real Qwen3 models must stay a small share of the memory.
_LOGITS_BYTES = 64 << 20
_ERROR_LEVEL = 4
_TYPE_F32 = 0
_MMAP = 1
_FLASH_OFF = 0
# Special tokens by transformers' names and GGUF's; the format's own spelling of the separator is as it is.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


class _ModelParams(C.Structure):
    _fields_ = [
        ("devices", C.c_void_p),
        ("tensor_buft_overrides", C.c_void_p),
        ("n_gpu_layers", C.c_int32),
        ("split_mode", C.c_int),
        ("load_mode", C.c_int),
        ("lazy_mode", C.c_int),
        ("main_gpu", C.c_int32),
        ("tensor_split", C.c_void_p),
        ("progress_callback", C.c_void_p),
        ("progress_callback_user_data", C.c_void_p),
        ("kv_overrides", C.c_void_p),
        *((name, C.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        *((name, C.c_bool) for name in ("no_host", "no_alloc", "load_mtp")),
    ]


class _ContextParams(C.Structure):
    _fields_ = [
        *((name, C.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, C.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, C.c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, C.c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", C.c_int),
        *((name, C.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, C.c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        ("cb_eval", C.c_void_p),
        ("cb_eval_user_data", C.c_void_p),
        *((name, C.c_int) for name in ("type_k", "type_v")),
        ("moe_cache_size", C.c_size_t),
        ("abort_callback", C.c_void_p),
        ("abort_callback_data", C.c_void_p),
        *((name, C.c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full")),
        ("kv_unified", C.c_bool),
        ("samplers", C.c_void_p),
        ("n_samplers", C.c_size_t),
        ("ctx_other", C.c_void_p),
    ]


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.c_void_p),
        ("embd", C.c_void_p),
        ("pos", C.c_void_p),
        ("n_seq_id", C.c_void_p),
        ("seq_id", C.c_void_p),
        ("logits", C.c_void_p),
    ]


_Log = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, C.c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (C.c_void_p, [C.c_char_p, _ModelParams]),
    "llama_model_free": (None, [C.c_void_p]),
    "llama_model_get_vocab": (C.c_void_p, [C.c_void_p]),
    "llama_vocab_n_tokens": (C.c_int32, [C.c_void_p]),
    "llama_model_n_ctx_train": (C.c_int32, [C.c_void_p]),
    "llama_init_from_model": (C.c_void_p, [C.c_void_p, _ContextParams]),
    "llama_free": (None, [C.c_void_p]),
    "llama_get_memory": (C.c_void_p, [C.c_void_p]),
    "llama_memory_clear": (None, [C.c_void_p, C.c_bool]),
    "llama_decode": (C.c_int32, [C.c_void_p, _Batch]),
    "llama_get_logits": (C.POINTER(C.c_float), [C.c_void_p]),
    "llama_model_meta_val_str": (C.c_int32, [C.c_void_p, C.c_char_p, C.c_char_p, C.c_size_t]),
    "llama_model_chat_template": (C.c_char_p, [C.c_void_p, C.c_char_p]),
    "llama_vocab_is_eog": (C.c_bool, [C.c_void_p, C.c_int32]),
    "llama_tokenize": (C.c_int32, [C.c_void_p, C.c_char_p, C.c_int32, C.c_void_p, C.c_int32, C.c_bool, C.c_bool]),
    "llama_token_to_piece": (C.c_int32, [C.c_void_p, C.c_int32, C.c_char_p, C.c_int32, C.c_int32, C.c_bool]),
}
_errors: list[str] = []


def _on_log(level: int, text: bytes | None, _data: object) -> None:
    """Keep the errors: llama.cpp tells the cause first and nothing but "failed" after it."""
    if level == _ERROR_LEVEL and text and text.strip():
        _errors.append(text.decode("utf-8", "replace").strip())


_log_callback = _Log(_on_log)


@cache
def library() -> C.CDLL:
    """Load and check llama.cpp once per process.

    Raises MissingRuntimeError when it is not the pinned one.
    """
    try:
        found = metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        raise MissingRuntimeError("running a GGUF file needs llama.cpp", _INSTALL) from None
    if found != PINNED:
        raise MissingRuntimeError(f"xllamacpp {found} is installed, {PINNED} is needed", _INSTALL)
    _check_cpu()
    # Threads that wait for each other spin briefly: sleeping at every operation makes decoding of a
    # small model many times slower, spinning without end does the same on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    try:
        lib = C.CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so"))
    except OSError as error:
        raise MissingRuntimeError(f"llama.cpp cannot be loaded ({error})", "apt-get install libgomp1") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    _check_structures(lib)
    lib.llama_log_set(_log_callback, None)
    lib.llama_backend_init()
    return lib


def _check_cpu() -> None:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    if "flags" in text and "avx2" not in text:
        raise MissingRuntimeError("the prebuilt llama.cpp needs a processor with AVX2", "use an ONNX artifact here")


def _check_structures(lib: C.CDLL) -> None:
    """Refuse a library whose structures are not as this file expects.

    The defaults at both ends of both structures tell it.
    """
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    found = (
        (model.split_mode, model.load_mode, model.use_extra_bufts, model.load_mtp),
        (context.n_ctx, context.n_batch, context.n_outputs_max_per_seq, context.flash_attn_type),
        (context.yarn_ext_factor, context.defrag_thold, context.type_k, context.type_v, context.moe_cache_size),
        (context.offload_kqv, context.no_perf, context.op_offload, context.kv_unified, context.ctx_other),
    )
    wanted = ((1, -1, True, False), (512, 2048, 1, -1), (-1.0, -1.0, 1, 1, 0), (True, True, True, False, None))
    if found != wanted:
        raise MissingRuntimeError("the installed llama.cpp has another interface than its version says", _INSTALL)


class LlamaSession:
    """See `run.session.Session`. `exact`: fp32 cache and no flash attention."""

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
        _errors.clear()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(self._path), parameters)
        if not self._model:
            raise InputError(f"{self._path}: llama.cpp cannot load it ({_reason()})")

    def _open_context(self, exact: bool) -> None:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = self.context, self._batch, self._batch
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = self._batch
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.op_offload = parameters.offload_kqv = False
        if exact:
            parameters.type_k = parameters.type_v = _TYPE_F32
            parameters.flash_attn_type = _FLASH_OFF
        _errors.clear()
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            reason = _reason()
            self.close()
            raise InputError(f"{self._path}: llama.cpp cannot open a context of {self.context} ({reason})")

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
        _errors.clear()
        status = self._lib.llama_decode(self._context, self._arrays.fill(ids, self._length))
        if status:
            raise InputError(f"{self._path}: llama.cpp failed with status {status} ({_reason()})")
        self._length += count
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (count, self.vocab_size)).copy()

    @property
    def tokenizer(self) -> LlamaTokenizer:
        """llama.cpp's own tokenizer, from the file's vocabulary."""
        return LlamaTokenizer(self._lib, self._model, self.vocab_size)

    def metadata(self, key: str) -> str | None:
        """A value of the file's header as text, None when there is none."""
        return _value(self._lib, self._model, key)

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None


def _value(lib: C.CDLL, model: Any, key: str) -> str | None:
    """A value of a model's header as text, None when there is none."""
    buffer = C.create_string_buffer(4096)
    length = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if length >= 0 else None


class LlamaTokenizer:
    """See `text.tokenizer.TextModel`; usable while its session is open."""

    def __init__(self, lib: C.CDLL, model: Any, vocab_size: int) -> None:
        self._lib, self._model, self._size = lib, model, vocab_size
        self._vocab = lib.llama_model_get_vocab(model)

    @property
    def template(self) -> str | None:
        """The chat template in the file, or None."""
        text = self._lib.llama_model_chat_template(self._model, None)
        return text.decode("utf-8", "replace") if text else None

    @property
    def tool_template(self) -> str | None:
        """The chat template for chats with tools, where it is another one."""
        text = self._lib.llama_model_chat_template(self._model, b"tool_use")
        return text.decode("utf-8", "replace") if text else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens as texts, by role, that the file names."""
        texts = {role: _value(self._lib, self._model, f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
        ids = {role: int(text) for role, text in texts.items() if text is not None and text.isdigit()}
        return {
            f"{role}_token": self._piece(token, True).decode("utf-8", "replace")
            for role, token in ids.items()
            if token < self._size
        }

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text.

        Special tokens written in it are recognised, none are added.
        """
        raw = text.encode()
        ids = np.empty(len(raw) + 8, np.int32)
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids.ctypes.data, len(ids), False, True)
        return ids[:count].copy()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return b"".join(self._piece(int(i), not skip_special) for i in ids).decode("utf-8", "replace")

    def _piece(self, token: int, special: bool) -> bytes:
        buffer = C.create_string_buffer(256)
        length = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(length, 0)]

    def stop_ids(self) -> set[int]:
        """Ids that end a generation."""
        return {token for token in range(self._size) if self._lib.llama_vocab_is_eog(self._vocab, token)}


class _BatchArrays:
    """Memory of one batch, reused: tokens, positions, one sequence id, logits wanted for all."""

    def __init__(self, size: int) -> None:
        self._tokens, self._positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._counts, self._wanted = np.ones(size, np.int32), np.ones(size, np.int8)
        self._sequence = C.c_int32(0)
        self._sequences = (C.c_void_p * size)(*[C.addressof(self._sequence)] * size)

    def fill(self, ids: NDArray[np.int32], begin: int) -> _Batch:
        count = len(ids)
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(begin, begin + count)
        return _Batch(
            count,
            self._tokens.ctypes.data,
            None,
            self._positions.ctypes.data,
            self._counts.ctypes.data,
            C.addressof(self._sequences),
            self._wanted.ctypes.data,
        )


def _reason() -> str:
    return _errors[0] if _errors else "no reason given"
