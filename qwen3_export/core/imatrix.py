"""Importance matrices of llama.cpp: mean square inputs of every linear.

GGUF    general.type = "imatrix" · imatrix.datasets · imatrix.chunk_count · imatrix.chunk_size · ours: qwen3_export.…
        NAME.in_sum2 [matrices, inputs] · NAME.counts [matrices, 1]     fp32; one matrix, or one per expert of a stack
legacy  entries i32 · per entry: length i32, name, calls i32, values i32, fp32 [values] · chunks i32 · length i32, text

NAME is a tensor of the model, such as blk.0.attn_q.weight. What no token reached has importance 1.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.files import open_regular, read_bytes
from qwen3_export.core.gguf_file import read_fp32, write_fp32
from qwen3_export.core.gguf_header import read_gguf_file
from qwen3_export.core.gguf_types import gguf_name
from qwen3_export.core.qwen3 import Qwen3Config
from qwen3_export.errors import InputError

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LEGACY_LIMIT = 1 << 20
_PROVENANCE = "qwen3_export."
# A router is measured by llama.cpp, and never quantized.
_BLOCK, _ROUTER = re.compile(r"blk\.(\d+)\."), ".ffn_gate_inp.weight"
ANOTHER = "it was measured on another model: `qwen3-export calibrate` measures this one; or leave --imatrix away"


@dataclass(frozen=True)
class ImatrixEntry:
    """One tensor: Σ x² `[matrices, inputs]` over its tokens `[matrices]`."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    @property
    def means(self) -> NDArray[np.float32]:
        """Mean squares `[matrices, inputs]`; 1 for a matrix that no token reached."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1).astype(np.float32)


@dataclass(frozen=True)
class Imatrix:
    """A whole importance matrix.

    `name` is the file's name, `datasets` what it was measured on, `provenance` what `calibrate` says of its making.
    `path` is where it was read, an input that no output may replace.
    """

    entries: Mapping[str, ImatrixEntry]
    datasets: Sequence[str] = ()
    chunks: int = 0
    chunk_size: int = 0
    name: str = "imatrix.gguf"
    provenance: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    def for_model(self, config: Qwen3Config) -> dict[str, NDArray[np.float32]]:
        """`{tensor: mean squares [matrices, inputs]}` of a model's matrices.

        Raises InputError when it is another model's: the widths, experts or layers are not the same.
        """
        wanted: dict[str, tuple[int, int]] = {}
        for module, (_, inputs) in config.all_matrices().items():
            tensor = f"{gguf_name(module)}.weight"
            wanted[tensor] = (config.num_experts if "_exps" in tensor else 1, inputs)
        found = {}
        for tensor, entry in self.entries.items():
            if tensor not in wanted:
                continue
            self._check_shape(tensor, wanted[tensor])
            if not np.isfinite(entry.means).all() or (entry.sums < 0).any():
                raise InputError(f"{self.name}: {tensor} has an importance that is negative or no finite number")
            found[tensor] = entry.means.reshape(wanted[tensor])
        self._check_names(wanted, config.num_layers)
        if not found:
            raise InputError(
                f"{self.name}: none of its {len(self.entries)} tensors belongs to this model, which has such as "
                f"{next(iter(wanted))}",
                ANOTHER,
            )
        return found

    def _check_shape(self, tensor: str, wanted: tuple[int, int]) -> None:
        """Raise InputError where a tensor has other inputs or experts than the model's."""
        experts, inputs = found = self.entries[tensor].sums.shape
        # The older form has the experts' values one after the other.
        if found in (wanted, (1, wanted[0] * wanted[1])):
            return
        if experts == wanted[0]:
            reason = f"{inputs} inputs, {wanted[1]} were expected"
        elif inputs == wanted[1]:
            reason = f"{experts} experts, {wanted[0]} were expected"
        else:
            reason = f"{experts} × {inputs} values, {wanted[0]} × {wanted[1]} were expected"
        raise InputError(f"{self.name}: {tensor} has {reason}", ANOTHER)

    def _check_names(self, wanted: Mapping[str, object], layers: int) -> None:
        """Raise InputError for a tensor in a block that the model does not have."""
        for tensor in self.entries:
            if tensor in wanted or (place := _BLOCK.match(tensor)) is None or tensor.endswith(_ROUTER):
                continue
            if int(place[1]) >= layers:
                raise InputError(
                    f"{self.name}: it has {tensor}, of {self.layers} layers; this model has {layers}", ANOTHER
                )
            beside = ", ".join(name for name in wanted if name.startswith(f"{place[0]}ffn"))
            raise InputError(f"{self.name}: it has {tensor}; this model has {beside} there", ANOTHER)

    @property
    def layers(self) -> int:
        """One more than the last block that it has a tensor of."""
        return max((int(place[1]) + 1 for place in map(_BLOCK.match, self.entries) if place), default=0)

    def write(self, path: Path) -> None:
        """Write the GGUF form."""
        metadata: dict[str, str | int | list[str]] = {
            "general.type": "imatrix",
            "imatrix.datasets": list(self.datasets),
            "imatrix.chunk_count": self.chunks,
            "imatrix.chunk_size": self.chunk_size,
            **{f"{_PROVENANCE}{key}": value for key, value in self.provenance.items()},
        }
        tensors: dict[str, NDArray] = {}
        for name, entry in self.entries.items():
            tensors[name + _SUMS] = entry.sums
            tensors[name + _COUNTS] = entry.counts[:, None]
        write_fp32(path, metadata, tensors)


def read_imatrix(path: Path) -> Imatrix:
    """Read either form; InputError when the file is neither."""
    try:
        with open_regular(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)


def _read_gguf(path: Path) -> Imatrix:
    header = read_gguf_file(path)
    metadata, tensors = header.values, {tensor.name: tensor for tensor in header.tensors}
    if metadata.get("general.type") != "imatrix":
        raise InputError(f"{path}: a GGUF file, but no importance matrix", "`qwen3-export calibrate` writes one")
    entries = {}
    for name, entry in tensors.items():
        if not name.endswith(_SUMS):
            continue
        base = name.removesuffix(_SUMS)
        if base + _COUNTS not in tensors:
            raise InputError(f"{path}: {name} has no {base + _COUNTS} beside it")
        if not entry.shape or 0 in entry.shape:
            raise InputError(f"{path}: {name} has the shape {list(entry.shape)}: there are no values in it")
        sums, counts = read_fp32(path, entry), read_fp32(path, tensors[base + _COUNTS]).reshape(-1)
        sums = sums.reshape(-1, sums.shape[-1])
        if len(counts) != len(sums):
            raise InputError(f"{path}: {base} has {len(sums)} sums and {len(counts)} counts")
        entries[base] = ImatrixEntry(sums, counts)
    numbers = {key: _count(path, metadata, f"imatrix.{key}") for key in ("chunk_count", "chunk_size")}
    listed = metadata.get("imatrix.datasets", [])
    datasets = list(map(str, listed)) if isinstance(listed, list) else [str(listed)]
    ours = {key.removeprefix(_PROVENANCE): str(text) for key, text in metadata.items() if key.startswith(_PROVENANCE)}
    return Imatrix(entries, datasets, numbers["chunk_count"], numbers["chunk_size"], path.name, ours, path)


def _count(path: Path, metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise InputError(f"{path}: {key} is {str(value)[:40]!r}, a 32-bit number was expected")
    return value


def _read_legacy(path: Path) -> Imatrix:
    """Values of a tensor are means already, the experts' one after the other."""
    data, position = read_bytes(path, most=None), 0

    def number() -> int:
        nonlocal position
        if position + 4 > len(data):
            raise InputError(f"{path}: it ends at byte {len(data)}, in the middle", "the file is truncated")
        (value,) = struct.unpack_from("<i", data, position)
        position += 4
        return int(value)

    def take(count: int) -> bytes:
        nonlocal position
        if not 0 <= count <= len(data) - position:
            raise InputError(f"{path}: neither a GGUF file nor an importance matrix of the older form")
        position += count
        return data[position - count : position]

    entries = {}
    count = number()
    if not 0 < count < _LEGACY_LIMIT:
        raise InputError(f"{path}: neither a GGUF file nor an importance matrix of the older form")
    for _ in range(count):
        name = take(number()).decode("utf-8", "replace")
        calls, size = max(number(), 1), number()
        values = np.frombuffer(take(4 * size), "<f4")
        # The older form stores sums over calls that are divided by the calls when it is read.
        entries[name] = ImatrixEntry(values[None], np.array([calls], np.float32))
    chunks, datasets = 0, []
    if position < len(data):
        chunks = number()
        datasets = [take(number()).decode("utf-8", "replace")] if position < len(data) else []
    return Imatrix(entries, datasets, chunks, 0, path.name, path=path)
