"""The C interface of the pinned llama.cpp: structures, functions, checks.

The library lies inside the `xllamacpp` wheel. The wheel's own Python classes do not give the logits of every position,
its C functions do. The wheel is built for one instruction set (AVX2), so results are the same on every x86-64 machine.

The C structures belong to one build of llama.cpp. The version is therefore pinned, and the library's default
parameters are compared with what is expected here before any other function is called.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
import os
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen3_export.core.memory import lacks_memory, out_of_memory
from qwen3_export.core.process import SPINS
from qwen3_export.core.processors import others_wait
from qwen3_export.errors import ExportError, InputError, MissingRuntimeError, ResourceError

PINNED = "2026.10.11549"
_INSTALL = "pip install 'qwen3-export[llamacpp]'"
_ERROR_LEVEL = 4


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


class LlamaBatch(C.Structure):
    """`llama_batch`: tokens and positions of one call, and which logits are wanted."""

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
_Abort = C.CFUNCTYPE(None, C.c_char_p)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, C.c_void_p]),
    "ggml_set_abort_callback": (C.c_void_p, [_Abort]),
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
    "llama_decode": (C.c_int32, [C.c_void_p, LlamaBatch]),
    "llama_get_logits": (C.POINTER(C.c_float), [C.c_void_p]),
    "llama_model_meta_val_str": (C.c_int32, [C.c_void_p, C.c_char_p, C.c_char_p, C.c_size_t]),
    "llama_model_chat_template": (C.c_char_p, [C.c_void_p, C.c_char_p]),
    "llama_vocab_is_eog": (C.c_bool, [C.c_void_p, C.c_int32]),
    "llama_tokenize": (C.c_int32, [C.c_void_p, C.c_char_p, C.c_int32, C.c_void_p, C.c_int32, C.c_bool, C.c_bool]),
    "llama_token_to_piece": (C.c_int32, [C.c_void_p, C.c_int32, C.c_char_p, C.c_int32, C.c_int32, C.c_bool]),
}
errors: list[str] = []


def _on_log(level: int, text: bytes | None, _data: object) -> None:
    """Keep the errors; the first one tells the cause."""
    if level == _ERROR_LEVEL and text and text.strip():
        errors.append(text.decode("utf-8", "replace").strip())


_log_callback = _Log(_on_log)
# The file that llama.cpp was last asked to open.
opened: list[Path] = []


def _on_abort(text: bytes | None) -> None:
    """End the process with one line where an assertion of llama.cpp fails.

    Without this it aborts and prints its stack.
    """
    first = (text or b"").decode("utf-8", "replace").strip().partition("\n")[0]
    place, _, said = first.partition(": ")
    reason = f"{place.rpartition('/')[2]}: {said}"
    sys.stdout.flush()
    where = f"{opened[-1]}: " if opened else ""
    print(f"error: {where}llama.cpp gave the file up ({reason})", file=sys.stderr, flush=True)
    os._exit(ResourceError.exit_code if _lacks_memory() else InputError.exit_code)


_abort_callback = _Abort(_on_abort)


@cache
def library() -> C.CDLL:
    """llama.cpp, loaded and checked once per process.

    Raises MissingRuntimeError when it is not installed, is not the pinned version, or needs another processor.
    """
    try:
        found = metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        raise MissingRuntimeError("running a GGUF file needs llama.cpp", _INSTALL) from None
    if found != PINNED:
        raise MissingRuntimeError(f"xllamacpp {found} is installed, {PINNED} is needed", _INSTALL)
    _check_cpu()
    # Threads that wait for each other spin briefly before they sleep: sleeping at every operation halves the speed of
    # a small model. Where other work has a processor, the thread that is waited for needs the one that would be spun
    # on: spinning then takes two to four times as long.
    os.environ.setdefault(SPINS, "0" if others_wait() else "20000")
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
    lib.ggml_set_abort_callback(_abort_callback)
    lib.llama_backend_init()
    return lib


def _check_cpu() -> None:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    if "flags" in text and "avx2" not in text:
        raise MissingRuntimeError("the prebuilt llama.cpp needs a processor with AVX2", "use an ONNX artifact here")


def _check_structures(lib: C.CDLL) -> None:
    """Refuse a library whose structures differ from those above.

    A field more or less moves those behind it, so default values at both ends of both structures are compared.
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


def failure(what: str) -> ExportError:
    """The error after a call that failed.

    The first error that llama.cpp has logged since `errors` was cleared is the reason.
    """
    reason = errors[0] if errors else "no reason given"
    return out_of_memory(what, reason) if _lacks_memory() else InputError(f"{what} ({reason})")


def _lacks_memory() -> bool:
    """Whether memory failed.

    A thread without room for its stack is "temporarily unavailable".
    """
    return any(lacks_memory(text) or "Resource temporarily unavailable" in text for text in errors)
