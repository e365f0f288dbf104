"""GGUF files for llama.cpp: 16-bit weights as its converter writes them, codes repacked bit for bit.

    scheme of a linear                          ggml type   weight
    int4 symmetric, group a multiple of 32      Q4_0        (code − 8) · d             exact
    int8 symmetric, group a multiple of 32      Q8_0        (code − 128) · d           exact
    int4 asymmetric, group a multiple of 32     Q4_1        code · d + m,  m = −zero·d in fp16: near-lossless

A scale is repeated for each 32 weights of its group. Tensors are written one at a time. A quantized
embedding is `token_embd` in the same types, a head of its own `output`; without one llama.cpp multiplies
by `token_embd`, so a tied matrix is stored once.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from qwen3_export import __version__
from qwen3_export.core import pack
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.coverage import GGUF_KEY
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.outputs import staged_file
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import EMBEDDING, HEAD, block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import InputError, ResourceError, UnsupportedError
from qwen3_export.ship.exactness import Inexact, max_relative_error, refuse_overflow
from qwen3_export.ship.gguf.metadata import ARCHITECTURES, add_metadata, check_architecture
from qwen3_export.ship.result import check_schemes, export_result, not_integer, provenance

TYPES = {"bf16": Type.BF16, "f16": Type.F16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0, "q4_1": Type.Q4_1}
_ELEMENTS_AT_ONCE = 4 << 20
_FILE_TYPES = {
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.v_proj": "attn_v",
}


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: name, numpy shape, type, and how to make its data."""

    name: str
    shape: tuple[int, ...]
    type: Type
    make: Callable[[], NDArray]


def type_for(scheme: QuantScheme) -> Type:
    """The ggml type that holds a scheme's codes; UnsupportedError's reason comes from `supports`."""
    if scheme.num_bits == 8:
        return Type.Q8_0
    return Type.Q4_0 if scheme.symmetric else Type.Q4_1


def supports(scheme: QuantScheme) -> str | None:
    """Why no ggml type holds a scheme's codes, or None when one does."""
    if reason := not_integer(scheme):
        return reason
    if scheme.num_bits not in (4, 8) or (scheme.num_bits == 8 and not scheme.symmetric):
        return f"no ggml block type has {scheme.num_bits}-bit {'symmetric' if scheme.symmetric else 'asymmetric'} codes"
    if scheme.strategy != "group" or scheme.group_size is None or scheme.group_size % pack.GGML_BLOCK:
        return "ggml blocks have 32 weights: the group_size must be a multiple of 32"
    return None


def export_gguf(
    checkpoint: Checkpoint, output: Path, type_name: str | None = None, force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a GGUF file; returns the result that `--json` prints.

    `type_name` None takes the type that holds the source's codes, or bf16 for a 16-bit source.
    Raises UnsupportedError, before anything is written, when the codes do not fit.
    """
    started, progress = time.monotonic(), progress or Progress()
    wanted = _checked_type(checkpoint, type_name)
    inexact: list[Inexact] = []
    plan = list(_plan(checkpoint, wanted, inexact))
    with staged_file(output, force, [checkpoint.folder]) as partial:
        _write(checkpoint, partial, plan, _FILE_TYPES[wanted], progress)
    files = [{"path": output.name, "bytes": output.stat().st_size, "sha256": sha256_file(output)}]
    return export_result(output, files, checkpoint, inexact, started)


def _checked_type(checkpoint: Checkpoint, type_name: str | None) -> Type:
    """What the file is called after; raises what `check_request` raises."""
    if type_name is not None and type_name not in TYPES:
        raise InputError(f"--type {type_name}: one of {', '.join(TYPES)} was expected")
    check_architecture(checkpoint.config)
    check_schemes(checkpoint, supports, "GGUF")
    return _wanted_type(checkpoint, type_name)


def check_request(checkpoint: Checkpoint, type_name: str | None = None) -> None:
    """Everything that can be known before the long work; a recipe's target is checked by it too, before quantizing.

    Raises InputError for an unknown type, UnsupportedError for the first tensor that does not fit.
    """
    for _ in _plan(checkpoint, _checked_type(checkpoint, type_name), []):
        pass


def planned_bytes(checkpoint: Checkpoint, type_name: str | None = None) -> int:
    """Size of the file that an export would write, from shapes alone: header and tensors."""
    wanted = _checked_type(checkpoint, type_name)
    plan = list(_plan(checkpoint, wanted, []))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURES[checkpoint.config.model_type])
        add_metadata(writer, checkpoint, _FILE_TYPES[wanted])
        _add_tensor_infos(writer, plan)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.stat().st_size + sum(_stored_bytes(item) for item in plan)


def _wanted_type(checkpoint: Checkpoint, type_name: str | None) -> Type:
    """What the file is called after: the type of its linears; embedding and head may have another."""
    inner = [scheme for name, scheme in checkpoint.schemes.items() if name not in (EMBEDDING, HEAD)]
    held = sorted({type_for(scheme) for scheme in inner or checkpoint.schemes.values()})
    if type_name is None:
        return held[0] if held else Type.BF16
    wanted = TYPES[type_name]
    if held and held != [wanted]:
        names = ", ".join(t.name.lower() for t in held)
        raise UnsupportedError(
            f"--type {type_name}: the codes of {checkpoint.name} are of type {names}, and are never requantized",
            f"leave --type away, or quantize the 16-bit original for {type_name}",
        )
    return wanted


def _plan(checkpoint: Checkpoint, wanted: Type, inexact: list[Inexact]) -> Iterator[Planned]:
    """Every tensor of the file in its order: head, embedding, blocks, final norm."""
    config = checkpoint.config
    # In a 16-bit file, and in the converter's q8_0, the embedding has the type of the rest.
    outer = wanted if not checkpoint.schemes and wanted in (Type.BF16, Type.F16, Type.Q8_0) else Type.BF16
    ends = [(EMBEDDING, "token_embd")] if config.tie_word_embeddings else [(HEAD, "output"), (EMBEDDING, "token_embd")]
    for module, name in ends:
        if module in checkpoint.schemes:
            yield _quantized(checkpoint, module, name, inexact)
        else:
            yield _plain(checkpoint, module, name, outer, inexact)
    for layer in range(config.num_layers):
        names = [*config.other_shapes(layer), *config.linear_shapes(layer)]
        for local in sorted(name for name in names if ".experts." not in name):
            module, name = f"{block_name(layer)}.{local}", f"blk.{layer}.{_BLOCK_NAMES[local]}"
            if module in checkpoint.schemes:
                yield _quantized(checkpoint, module, name, inexact)
            else:
                yield _plain(checkpoint, module, name, wanted if not checkpoint.schemes else Type.BF16, inexact)
            if local == "input_layernorm" and config.is_sparse(layer):
                yield from _experts(checkpoint, layer, wanted, inexact)
    yield _plain(checkpoint, "model.norm", "output_norm", wanted, inexact)


def _plain(checkpoint: Checkpoint, module: str, name: str, wanted: Type, inexact: list[Inexact]) -> Planned:
    tensor = f"{module}.weight"
    shape = checkpoint.entry(tensor).shape
    kind = _plain_type(name, shape, wanted)
    return Planned(f"{name}.weight", shape, kind, lambda: encode(tensor, checkpoint.read(tensor), kind, inexact))


def _plain_type(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    """Norms and the router are always fp32; a row that ggml cannot cut in blocks stays 16-bit."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp"):
        return Type.F32
    blocks = wanted in (Type.Q8_0, Type.Q4_0, Type.Q4_1)
    return Type.F16 if blocks and shape[-1] % pack.GGML_BLOCK else wanted


def encode(tensor: str, array: NDArray, kind: Type, inexact: list[Inexact]) -> NDArray:
    """A 16- or 32-bit array as data of a ggml type; what changes is noted in `inexact`."""
    if kind == Type.BF16 and array.dtype.name == "bfloat16":
        return array.view(np.uint8)
    if array.ndim == 1:
        return array.astype(np.float32)
    at_once = max(1, _ELEMENTS_AT_ONCE // array.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        pieces = [_encode_rows(array[i : i + at_once], kind) for i in range(0, len(array), at_once)]
    error = max(error for _, error in pieces)
    refuse_overflow(tensor, error, kind.name.lower())
    if error:
        inexact.append({"name": tensor, "max_rel_error": error})
    return np.concatenate([data for data, _ in pieces])


def _encode_rows(array: NDArray, kind: Type) -> tuple[NDArray, float]:
    """Some rows, and how far the furthest number moved; fp32 copies of a whole embedding would be large."""
    single = array.astype(np.float32)
    if kind == Type.F32:
        return single, 0.0
    if kind == Type.F16:
        half = single.astype(np.float16)
        return half, max_relative_error(single, half)
    data = gguf.quants.quantize(single, kind)
    return data, max_relative_error(single, gguf.quants.dequantize(data, kind))


def _quantized(checkpoint: Checkpoint, module: str, name: str, inexact: list[Inexact]) -> Planned:
    shape = checkpoint.config.all_matrices()[module]
    kind = type_for(checkpoint.schemes[module])

    def make() -> NDArray:
        tensor = checkpoint.linear(module)
        assert isinstance(tensor, QuantizedTensor)
        return repack(tensor, inexact)

    return Planned(f"{name}.weight", shape, kind, make)


def repack(tensor: QuantizedTensor, inexact: list[Inexact]) -> NDArray[np.uint8]:
    """Bytes `[out, row bytes]` of a quantized linear; codes unchanged, scales repeated per block."""
    repeat = tensor.scheme.group_length(tensor.shape[1]) // pack.GGML_BLOCK
    scales = tensor.scales32
    if (error := max_relative_error(scales, scales.astype(np.float16))) > 0:
        inexact.append({"name": f"{tensor.name}.scales", "max_rel_error": error})
    if tensor.zeros is None:
        packer = pack.pack_q8_0 if tensor.scheme.num_bits == 8 else pack.pack_q4_0
        return packer(tensor.codes, np.repeat(scales, repeat, 1))
    minimums = -tensor.zeros.astype(np.float32) * scales
    if (error := max_relative_error(minimums, minimums.astype(np.float16))) > 0:
        inexact.append({"name": f"{tensor.name}.minimums", "max_rel_error": error})
    return pack.pack_q4_1(tensor.codes, np.repeat(scales, repeat, 1), np.repeat(minimums, repeat, 1))


def _experts(checkpoint: Checkpoint, layer: int, wanted: Type, inexact: list[Inexact]) -> Iterator[Planned]:
    """A layer's experts, stacked along a new first axis: down, gate, up."""
    config = checkpoint.config
    for part in ("down_proj", "gate_proj", "up_proj"):
        modules = [f"{block_name(layer)}.mlp.experts.{expert}.{part}" for expert in range(config.num_experts)]
        shape = config.linear_shapes(layer)[f"mlp.experts.0.{part}"]
        kinds = {type_for(checkpoint.schemes[m]) if m in checkpoint.schemes else None for m in modules}
        if len(kinds) > 1:
            raise UnsupportedError(f"{modules[0]}: llama.cpp stacks experts, so all of a layer need one scheme")
        held = kinds.pop()
        plain = Type.BF16 if checkpoint.schemes else _plain_type(part, shape, wanted)

        def make(modules: list[str] = modules, kind: Type = plain) -> NDArray:
            return np.stack([_expert(checkpoint, module, kind, inexact) for module in modules])

        name = f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight"
        yield Planned(name, (config.num_experts, *shape), held if held is not None else plain, make)


def _expert(checkpoint: Checkpoint, module: str, kind: Type, inexact: list[Inexact]) -> NDArray:
    tensor = checkpoint.linear(module)
    return repack(tensor, inexact) if isinstance(tensor, QuantizedTensor) else encode(module, tensor, kind, inexact)


def _write(checkpoint: Checkpoint, path: Path, plan: list[Planned], file_type: int, progress: Progress) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURES[checkpoint.config.model_type])
    add_metadata(writer, checkpoint, file_type)
    if checkpoint.schemes:
        origin = provenance(checkpoint)
        writer.add_string("qwen3_export.version", __version__)
        writer.add_string("qwen3_export.source.sha256", origin["source"]["sha256"])
        writer.add_string("qwen3_export.recipe", origin["quantized"]["recipe"])
        if origin["experts"] is not None:
            writer.add_string(GGUF_KEY, json.dumps(origin["experts"]))
    _add_tensor_infos(writer, plan)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.bar(f"export tensors of {path.name.removesuffix('.partial')}", len(plan)) as tick:
            for item in plan:
                writer.write_tensor_data(np.ascontiguousarray(item.make()))
                tick()
    except OSError as error:
        if error.errno is None:  # numpy's writer tells how much it wrote, and not why
            raise ResourceError(f"{path.parent}: the disk is full ({error})", "free some room") from error
        raise
    finally:
        writer.close()


def _add_tensor_infos(writer: gguf.GGUFWriter, plan: list[Planned]) -> None:
    for item in plan:
        shape, dtype = _stored_shape(item)
        writer.add_tensor_info(item.name, shape, dtype, _stored_bytes(item), raw_dtype=item.type)


def _stored_bytes(item: Planned) -> int:
    shape, dtype = _stored_shape(item)
    return math.prod(shape) * dtype.itemsize


def _stored_shape(item: Planned) -> tuple[tuple[int, ...], np.dtype]:
    if item.type in (Type.F32, Type.F16):
        return item.shape, np.dtype(np.float32 if item.type == Type.F32 else np.float16)
    block, size = gguf.GGML_QUANT_SIZES[item.type]
    return (*item.shape[:-1], item.shape[-1] // block * size), np.dtype(np.uint8)
