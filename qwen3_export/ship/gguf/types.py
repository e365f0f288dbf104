"""The ggml type of every matrix, by the scheme of its codes.

    scheme of a matrix                          ggml type
    int4 symmetric, group a multiple of 32      q4_0        exact
    int8 symmetric, group a multiple of 32      q8_0        exact
    int2 symmetric, group a multiple of 64      q2_0        exact
    int4 asymmetric, group a multiple of 32     q4_1        its fp16 minimum near-lossless
    mxfp4, and every block type of ggml         the same    exact

Codes that no type holds are rounded onto another type only if the user permits it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core import pack
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.gguf_types import (
    FILE_TYPES,
    PLAIN,
    Overrides,
    block_length,
    file_type,
    fitting_type,
    gguf_name,
    module_types,
    wanted_types,
)
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.scheme import QuantScheme, scheme_of_type
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import UnsupportedError
from qwen3_export.ggml import import_loops, round_rows

# Types to round codes to again, smallest first, and the relative error that is small enough.
_CANDIDATES = ("q4_0", "q4_1", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0")
_CLOSE = 0.01
_SAMPLE_ROWS = 64
# What gives llama.cpp about as many bits as codes that it has no type for.
_REMEDIES = {
    2: "--recipe gguf-q2_k",
    3: "--recipe gguf-q3_k_m",
    4: "--recipe gguf-q4_k_m",
    8: "--type q8_0, or with --recipe gguf-q6_k",
}
_HELD = "leave --type away, or quantize the 16-bit original for it, or --allow-requantize to round the codes again"


@dataclass(frozen=True)
class Requantized:
    """A tensor whose codes were rounded again."""

    scheme: QuantScheme
    type: str


@dataclass(frozen=True)
class Types:
    """The name of the file's type, and the type of every matrix.

    `requantized` are the matrices whose codes are rounded again. `fallbacks` have the type that was wanted for a matrix
    whose rows its blocks do not divide.
    """

    file_type: str
    modules: Mapping[str, str]
    requantized: Mapping[str, Requantized] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def rounds(self) -> bool:
        """Whether the export rounds any matrix."""
        return any(name not in PLAIN for name in self.modules.values())


def type_for(scheme: QuantScheme) -> str | None:
    """The ggml type that holds a scheme's codes; None when there is none."""
    if scheme.ggml_type is not None:
        return scheme.ggml_type
    if scheme.activations or scheme.strategy != "group" or scheme.group_size is None:
        return None
    if scheme.type == "float":
        return "mxfp4" if (scheme.num_bits, scheme.scale_dtype) == (4, "e8m0") else None
    if scheme.num_bits == 2:
        return "q2_0" if scheme.symmetric and scheme.group_size % 64 == 0 else None
    if scheme.group_size % pack.GGML_BLOCK:
        return None
    names = {(8, True): "q8_0", (4, True): "q4_0", (4, False): "q4_1"}
    return names.get((scheme.num_bits, scheme.symmetric))


def widened(scheme: QuantScheme) -> str | None:
    """The 4-bit type that holds 2- or 3-bit codes; None when there is none."""
    if scheme.type != "int" or scheme.activations or scheme.num_bits > 3 or scheme.strategy != "group":
        return None
    if scheme.group_size is None or scheme.group_size % pack.GGML_BLOCK:
        return None
    return "q4_0" if scheme.symmetric else "q4_1"


def supports(scheme: QuantScheme) -> str | None:
    """None when a ggml type holds a scheme's codes, else why none does."""
    if type_for(scheme) is not None:
        return None
    if scheme.activations:
        return f"activations rounded by {scheme.activations} have no place there; the folder itself runs in vLLM"
    if (scheme.type, scheme.scale_dtype) == ("float", "e4m3"):
        return "llama.cpp's type for it, NVFP4, is not written here; the folder itself runs in vLLM and SGLang"
    if scheme.type == "float":
        return f"ggml has no type of {scheme.num_bits}-bit floats; the folder itself runs in vLLM and SGLang"
    kind = f"{scheme.num_bits}-bit {'symmetric' if scheme.symmetric else 'asymmetric'}"
    if scheme.num_bits == 3 or (scheme.num_bits in (2, 8) and not scheme.symmetric):
        return f"no ggml block type has {kind} codes"
    if scheme.num_bits == 2:
        return "ggml's 2-bit blocks (q2_0) have 64 weights: the group_size must be a multiple of 64"
    return "ggml blocks have 32 weights: the group_size must be a multiple of 32"


def choose_types(
    checkpoint: Checkpoint, type_name: str | None, overrides: Overrides, weighed: bool, allow_requantize: bool
) -> Types:
    """The types of a file.

    Without `type_name` a 16-bit source becomes bf16, and codes get the type that holds them; 16-bit matrices beside
    codes stay in 16 bits unless `overrides` ask for a type. Raises UnsupportedError when codes do not fit and may not
    be rounded again.
    """
    name = None if type_name is None else file_type(type_name)
    if not checkpoint.schemes:
        name = name or "bf16"
        return _settle(checkpoint, name, wanted_types(checkpoint.config, name, weighed, overrides), False)
    asked = _asked(checkpoint, overrides)
    if name is None:
        held = {module: type_for(scheme) for module, scheme in checkpoint.schemes.items()}
        called = _called(checkpoint, {module: found for module, found in held.items() if found is not None})
        wanted: Mapping[str, str] = {}
    else:
        called, wanted = name, wanted_types(checkpoint.config, name, weighed, overrides)
        if not allow_requantize:
            _refuse_other_type(checkpoint, name)
    return _settle(checkpoint, called, {**(wanted if allow_requantize else {}), **asked}, allow_requantize)


def _asked(checkpoint: Checkpoint, overrides: Overrides) -> dict[str, str]:
    """`{module: type}` of the matrices that a pattern or role decides."""
    config = checkpoint.config
    types = wanted_types(config, "f16", overrides=overrides)
    return {module: found for module, found in types.items() if is_asked(module, overrides, config.tie_word_embeddings)}


def is_asked(module: str, overrides: Overrides, tied: bool) -> bool:
    """Whether the user asked for the type of this matrix by pattern or role."""
    if module == EMBEDDING and (overrides.token_embedding or (tied and overrides.output)):
        return True
    if module == HEAD and overrides.output:
        return True
    return overrides.of(f"{gguf_name(module)}.weight") is not None


def _settle(checkpoint: Checkpoint, called: str, wanted: Mapping[str, str], allow: bool) -> Types:
    """The type of every matrix: codes keep theirs unless another is wanted or needed."""
    chosen, again, nearest = dict[str, str](), dict[str, Requantized](), dict[QuantScheme, str]()
    fallbacks = {}
    for module, shape in checkpoint.config.all_matrices().items():
        fitted = fitting_type(wanted[module], shape[1]) if module in wanted else None
        if fitted not in (None, wanted.get(module)):
            fallbacks[module] = wanted[module]
        scheme = checkpoint.schemes.get(module)
        if scheme is None:
            chosen[module] = fitted or "bf16"
            continue
        held = None if module in checkpoint.reordered else type_for(scheme)
        if held is None and not allow:
            raise _unsupported(checkpoint, module, scheme)
        if held is None and module not in wanted and scheme not in nearest:
            nearest[scheme] = nearest_type(checkpoint, module)[0]
        target = fitted or held or _that_fits(nearest[scheme], shape[1])
        if held is not None and target != held and not allow:
            raise UnsupportedError(
                f"{module}: its codes are of type {held}, {target} was asked for, and codes are not rounded again",
                "leave the tensor out of --tensor-type, or --allow-requantize",
            )
        chosen[module] = target
        if target != held:
            again[module] = Requantized(scheme, target)
    return Types(called, chosen, again, fallbacks)


def _that_fits(name: str, inputs: int) -> str:
    return name if inputs % block_length(name) == 0 else "q8_0" if inputs % 32 == 0 else "f16"


def _unsupported(checkpoint: Checkpoint, module: str, scheme: QuantScheme) -> UnsupportedError:
    """The error for a tensor that no type holds, with the nearest type."""
    reason = supports(scheme) or "its groups are not consecutive inputs (g_idx, from desc_act)"
    name, error = nearest_type(checkpoint, module)
    shape = checkpoint.config.all_matrices()[module]
    bits = 16.0 if name in PLAIN else scheme_of_type(name).bits_per_weight(shape)
    cost = (
        f"{bits:.2f} bits per weight in place of {scheme.bits_per_weight(shape):.2f}, a relative error of {error:.1e}"
    )
    return UnsupportedError(
        f"{module} ({scheme.label}) cannot be exported to GGUF: {reason}; the nearest type is {name}: {cost}",
        f"--allow-requantize rounds such tensors onto it; better is to {_remedy(scheme)}",
    )


def _remedy(scheme: QuantScheme) -> str:
    """What to do in place of exporting codes that no type holds."""
    remedy = f"export the 16-bit original with {_REMEDIES[scheme.num_bits]}"
    ordered = supports(scheme) is None
    return f"{remedy}, or with gptq-w4a16-g128, whose act_order needs no g_idx" if ordered else remedy


def nearest_type(checkpoint: Checkpoint, module: str) -> tuple[str, float]:
    """The smallest type within 1 % of a tensor, else q8_0, and its error.

    The error is the root of Σ δ² / Σ w², measured on some rows. 2- and 3-bit codes fit into 4-bit types without error.
    """
    name = widened(checkpoint.schemes[module])
    if name is not None and module not in checkpoint.reordered:
        return name, 0.0
    weight = _sample(checkpoint, module)
    inputs, best = weight.shape[1], ("f16", 0.0)
    import_loops()
    for name in sorted(_CANDIDATES, key=lambda name: scheme_of_type(name).bits_per_weight((256, 256))):
        if inputs % block_length(name):
            continue
        found = round_rows(module, weight, scheme_of_type(name))
        best = name, (found.missed / found.whole) ** 0.5 if found.whole else 0.0
        if best[1] < _CLOSE:
            break
    return best


def _sample(checkpoint: Checkpoint, module: str) -> NDArray[np.float32]:
    """Some rows of a matrix in fp32: dequantized codes, or weights not yet quantized."""
    plain = f"{module}.weight"
    if plain in checkpoint.files and checkpoint.entry(plain).dtype.itemsize > 1:
        return checkpoint.rows(plain, 0, min(_SAMPLE_ROWS, checkpoint.entry(plain).shape[0])).astype(np.float32)
    tensor = checkpoint.linear(module)
    assert isinstance(tensor, QuantizedTensor)
    if tensor.scheme.per_row:
        tensor = tensor.rows(np.arange(0, tensor.shape[0], -(-tensor.shape[0] // _SAMPLE_ROWS)))
    return dequantize(tensor)[:_SAMPLE_ROWS]


def _refuse_other_type(checkpoint: Checkpoint, name: str) -> None:
    """Raise UnsupportedError when codes have other types than the file would."""
    inner = {module: scheme for module, scheme in checkpoint.schemes.items() if module not in (EMBEDDING, HEAD)}
    held = {module: type_for(scheme) or scheme.label for module, scheme in (inner or checkpoint.schemes).items()}
    if set(held.values()) == {FILE_TYPES[name].base} or _is_mix(checkpoint, held, name):
        return
    names = ", ".join(sorted(set(held.values())))
    raise UnsupportedError(
        f"--type {name}: the codes of {checkpoint.name} are of type {names}, and are never requantized unasked", _HELD
    )


def _is_mix(checkpoint: Checkpoint, held: Mapping[str, str], name: str) -> bool:
    """Whether the types are those of a mix, with or without an importance matrix."""
    for weighed in (True, False):
        types = module_types(checkpoint.config, name, weighed)
        if all(types[module] == found for module, found in held.items()):
            return True
    return False


def _called(checkpoint: Checkpoint, held: Mapping[str, str]) -> str:
    """The name of a file of codes: its mix, else its most common type."""
    inner = {module: found for module, found in held.items() if module not in (EMBEDDING, HEAD)} or dict(held)
    if not inner:
        return "q8_0"
    if (mix := next((name for name in FILE_TYPES if _is_mix(checkpoint, inner, name)), None)) is not None:
        return mix
    base = Counter(inner.values()).most_common(1)[0][0]
    return next(name for name, kind in FILE_TYPES.items() if kind.base == base)
