"""The ggml type of every matrix in a GGUF file, by llama.cpp's rule.

The rule depends on shapes alone. Of n layers, layer i has `more(i)` in the first eighth, in the last eighth, and at
every third layer between them.

    file type           attn_v                  attn_output   ffn_down
    q4_k_m, q5_k_m      more(i): q6_k           base          more(i): q6_k
    q4_k_s              i < 4: q5_k             base          i < n / 8: q5_k
    q3_k_m              i < 2: q5_k, else q4_k  q4_k          i < n / 16: q5_k, else q4_k
    q3_k_l              q5_k                    q5_k          q5_k
    q2_k                shared 4 ways: q4_k, else q3_k  q3_k  q3_k
    iq4_nl, iq4_xs      shared 4 ways: q5_k     base          i < n / 8, without importance: q5_k
    q4_0, q5_0          base                    base          i < n / 8, with importance: q4_1, q5_1

Everything else has the base type. The head, or a tied embedding, has q6_k (q8_0 in a q8_0 file). With exactly eight
experts attention keeps more bits. Where the type's blocks do not divide a row, it takes a type with blocks of 32, or
f16. `mxfp4_moe` stores experts in mxfp4 and the rest in q8_0; `q2_0` stores an untied embedding in q4_k.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from qwen3_export.core.architecture import is_expert
from qwen3_export.core.gguf_header import TYPES
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, Qwen3Config, block_name
from qwen3_export.core.scheme import GGML_TYPES
from qwen3_export.errors import InputError

PLAIN = ("f32", "f16", "bf16")
# What llama.cpp's own converter writes, and `gguf` byte for byte the same.
CONVERTERS_TYPES = (*PLAIN, "q8_0")
# ggml's numbers of the types, and how many weights of a row are stored together in how many bytes.
GGML_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
_BLOCKS = {name: (length, size) for name, length, size in TYPES.values()}


@dataclass(frozen=True)
class FileType:
    """Base type of a file, and llama.cpp's number of the mix.

    The number is `general.file_type`.
    """

    base: str
    number: int


FILE_TYPES = {
    "f16": FileType("f16", 1),
    "bf16": FileType("bf16", 32),
    "q8_0": FileType("q8_0", 7),
    "q4_0": FileType("q4_0", 2),
    "q4_1": FileType("q4_1", 3),
    "q5_0": FileType("q5_0", 8),
    "q5_1": FileType("q5_1", 9),
    "q2_k": FileType("q2_k", 10),
    "q3_k_s": FileType("q3_k", 11),
    "q3_k_m": FileType("q3_k", 12),
    "q3_k_l": FileType("q3_k", 13),
    "q4_k_s": FileType("q4_k", 14),
    "q4_k_m": FileType("q4_k", 15),
    "q5_k_s": FileType("q5_k", 16),
    "q5_k_m": FileType("q5_k", 17),
    "q6_k": FileType("q6_k", 18),
    "iq4_nl": FileType("iq4_nl", 25),
    "iq4_xs": FileType("iq4_xs", 30),
    "mxfp4": FileType("mxfp4", 38),
    "mxfp4_moe": FileType("mxfp4", 38),
    "q2_0": FileType("q2_0", 41),
}
# A name without a size, such as q4_k, stands for the middle one.
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_FALLBACK = {
    "q2_0": "q4_0", "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl",
}  # fmt: skip
_EIGHT_EXPERTS = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Overrides:
    """Types that the user asked for, by pattern or by role.

    Patterns are regular expressions, searched for in tensor names; the first that matches decides. Their capitals are
    made small first, as llama-quantize does it.
    """

    patterns: tuple[tuple[str, str], ...] = ()
    token_embedding: str | None = None
    output: str | None = None
    _compiled: tuple[tuple[re.Pattern[str], str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        compiled = []
        for pattern, name in self.patterns:
            check_type(name, f"--tensor-type {pattern}={name}")
            try:
                compiled.append((re.compile(pattern.lower()), name))
            except re.error as error:
                raise InputError(f"--tensor-type {pattern}={name}: not a regular expression ({error})") from error
        for option, given in (("--token-embedding-type", self.token_embedding), ("--output-type", self.output)):
            if given is not None:
                check_type(given, f"{option} {given}")
        object.__setattr__(self, "_compiled", tuple(compiled))

    def of(self, tensor: str) -> str | None:
        """The type that a pattern asks for, for a tensor such as `blk.0.attn_v.weight`."""
        return next((name for pattern, name in self._compiled if pattern.search(tensor)), None)


def check_type(name: str, where: str) -> None:
    """Raise InputError when there is no tensor type of this name."""
    if name not in GGML_TYPES and name not in PLAIN:
        raise InputError(f"{where}: one of {', '.join((*PLAIN, *GGML_TYPES))} was expected")


def file_type(name: str) -> str:
    """The name of a file type, its aliases replaced; InputError when there is none."""
    found = _ALIASES.get(name.lower(), name.lower())
    if found not in FILE_TYPES:
        raise InputError(f"--type {name}: one of {', '.join(FILE_TYPES)} was expected")
    return found


def block_size(name: str) -> tuple[int, int]:
    """Weights of a row that a type stores together, and their bytes."""
    return _BLOCKS[name]


def block_length(name: str) -> int:
    """Weights of a row that a type stores together."""
    return block_size(name)[0]


def gguf_name(module: str) -> str:
    """A matrix's name in a GGUF file, without `.weight`; an expert's stack's."""
    if module in (EMBEDDING, HEAD):
        return "token_embd" if module == EMBEDDING else "output"
    layer, _, local = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_role(local)}"


@lru_cache(maxsize=4096)
def _role(local: str) -> str:
    """A linear's name behind its block's; experts of a stack share it."""
    name = _NAMES[local] if local in _NAMES else _NAMES[local.rpartition(".")[2]]
    return f"{name}{'_exps' if is_expert(local) else ''}"


def module_types(
    config: Qwen3Config, name: str, weighed: bool = False, overrides: Overrides | None = None
) -> Mapping[str, str]:
    """`{module: ggml type}` of every matrix of a model for a file type.

    Experts of a stack share one type. `weighed` says whether an importance matrix is used. Types are lower-case names
    such as `q4_k` or `f16`.
    """
    shapes = config.all_matrices()
    wanted = wanted_types(config, name, weighed, overrides)
    return {module: fitting_type(found, shapes[module][1]) for module, found in wanted.items()}


def wanted_types(
    config: Qwen3Config, name: str, weighed: bool = False, overrides: Overrides | None = None
) -> Mapping[str, str]:
    """As `module_types`, before the widths of rows are looked at."""
    rule, found, stacks = _Rule(config, file_type(name), weighed, overrides or Overrides()), dict[str, str](), {}
    for module in (EMBEDDING, HEAD):
        if module in config.outer_matrices():
            found[module] = rule.outer(module)
    for layer in range(config.num_layers):
        for local in config.linear_shapes(layer):
            tensor = f"blk.{layer}.{_role(local)}"
            if tensor not in stacks:
                stacks[tensor] = rule.inner(tensor, layer)
            found[f"{block_name(layer)}.{local}"] = stacks[tensor]
    return found


class _Rule:
    """The rule at work on one model.

    It counts value projections as it goes, as llama.cpp does: those that a pattern decides do not count.
    """

    def __init__(self, config: Qwen3Config, name: str, weighed: bool, overrides: Overrides) -> None:
        self.config, self.name, self.weighed, self.overrides = config, name, weighed, overrides
        self.base, self.values, self.downs = FILE_TYPES[name].base, 0, 0

    def outer(self, module: str) -> str:
        """Type of the embedding or of a head of its own."""
        inputs, given, tensor = self.config.hidden_size, self.overrides, f"{gguf_name(module)}.weight"
        fixed = given.token_embedding if module == EMBEDDING else given.output
        head = module == HEAD or self.config.tie_word_embeddings
        if fixed is not None:
            _check_fits(fixed, inputs, tensor)
            return fixed
        if (chosen := given.of(tensor)) is not None:
            return chosen
        if head and given.output is not None:
            return given.output
        if self.base in PLAIN or (not head and self.name != "mxfp4_moe"):
            return "q4_k" if self.name == "q2_0" else self.base
        return "q8_0" if self.name in ("q8_0", "mxfp4_moe") else "q6_k"

    def inner(self, tensor: str, layer: int) -> str:
        """Type of a linear, or of a stack of experts."""
        if (chosen := self.overrides.of(f"{tensor}.weight")) is not None:
            return chosen
        role = tensor.partition(f"blk.{layer}.")[2]
        found = self.base
        if self.name == "mxfp4_moe":
            found = "mxfp4" if role.endswith("_exps") else "q8_0"
        elif self.base not in PLAIN and role == "attn_v":
            found, self.values = self._value(self.values), self.values + 1
        elif role.startswith("ffn_down"):
            index = layer if role.endswith("_exps") else self.downs
            found, self.downs = self._down(index), self.downs + 1
        elif role == "attn_output":
            found = self._output()
        elif role == "attn_k" and self.config.num_experts == 8 and self.base not in PLAIN:
            found = "q8_0"
        return found

    def _more(self, index: int) -> bool:
        layers = self.config.num_layers
        return index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2

    def _value(self, index: int) -> str:
        shared = self.config.num_heads // self.config.num_kv_heads >= 4
        if self.config.num_experts == 8:
            return "q8_0"
        if self.name == "q2_k":
            return "q4_k" if shared else "q3_k"
        if self.name in ("iq4_nl", "iq4_xs") and shared:
            return "q5_k"
        if self.name == "q3_k_m":
            return "q5_k" if index < 2 else "q4_k"
        if self.name in ("q4_k_m", "q5_k_m") and self._more(index):
            return "q6_k"
        return "q5_k" if self.name == "q3_k_l" or (self.name == "q4_k_s" and index < 4) else self.base

    def _down(self, index: int) -> str:
        layers = self.config.num_layers
        early = index < layers // 8
        if self.name == "q2_k":
            return "q3_k"
        if self.name == "q3_k_m":
            return "q5_k" if index < layers // 16 else "q4_k"
        if self.name in ("q4_k_m", "q5_k_m") and self._more(index):
            return "q6_k"
        if self.name == "q3_k_l" or (self.name == "q4_k_s" and early):
            return "q5_k"
        if self.name in ("iq4_nl", "iq4_xs") and early and not self.weighed:
            return "q5_k"
        if self.name in ("q4_0", "q5_0") and early and self.weighed:
            return {"q4_0": "q4_1", "q5_0": "q5_1"}[self.name]
        return self.base

    def _output(self) -> str:
        if self.config.num_experts == 8:
            return "q5_k" if self.name in _EIGHT_EXPERTS else self.base
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(self.name, self.base)


def fitting_type(name: str, inputs: int) -> str:
    """The type itself, or one whose blocks divide a row of `inputs` weights."""
    for found in (name, _FALLBACK.get(name)):
        if found is not None and inputs % block_length(found) == 0:
            return found
    return "f16"


def _check_fits(name: str, inputs: int, tensor: str) -> None:
    """Raise InputError where a type asked for by role does not fit."""
    if inputs % block_length(name):
        raise InputError(
            f"{tensor}: its {inputs} inputs are not divisible by {block_length(name)}, the block of {name}"
        )
