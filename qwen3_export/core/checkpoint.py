"""Checkpoints: a folder of safetensors shards, read tensor by tensor, 16-bit or quantized.

In a quantized folder a linear is stored as several tensors; `core.layouts` has one module for each way of storing
them, and `core.quantization_config` recognises folders that other tools wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core import quantization_config
from qwen3_export.core.files import read_json
from qwen3_export.core.layouts import DEFAULT, Stored, layout
from qwen3_export.core.manifest import MANIFEST, beside, read_manifest, sha256_file
from qwen3_export.core.qwen3 import Qwen3Config, parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.shards import INDEX, open_shards
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.core.tensor_names import refuse_adapter, with_usual_names
from qwen3_export.core.tensorfile import DTYPES, Entry, Spec, StoredTensor, TensorFile
from qwen3_export.errors import CheckpointError, RecipeError

_IGNORED = (".rotary_emb.inv_freq",)
_SIDECARS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
# Files in which other tools describe how their folder is quantized. They would be wrong in a folder made from it.
_TOOLS = (quantization_config.FALLBACK, quantization_config.MODELOPT, "quantization_config.json", "quant_config.json")
_FLOATS = tuple(DTYPES[name] for name in ("F32", "F16", "BF16"))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every shard's header is checked, no weight is read.

    `files` has the shard of every tensor, `schemes` the scheme of every quantized matrix by module name.
    `quantization` is another tool's `quantization_config`, empty for a folder of ours. `reordered` names
    the linears whose groups are not consecutive inputs, as GPTQ's `desc_act` leaves them.
    """

    folder: Path
    config: Qwen3Config
    raw_config: Mapping[str, Any]
    files: Mapping[str, TensorFile]
    schemes: Mapping[str, QuantScheme]
    layout: str = DEFAULT
    quantization: Mapping[str, Any] = field(default_factory=dict)
    reordered: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Its name in tables and manifests, never a path.

        The cache of the hub names folders by commit, so the model's name is taken from the folder above.
        """
        if self.folder.parent.name == "snapshots":
            return self.folder.parent.parent.name.rpartition("--")[2]
        return self.folder.name

    def entry(self, tensor: str) -> Entry:
        """Type and shape of a stored tensor."""
        return self.files[tensor].entries[tensor]

    def read(self, tensor: str) -> NDArray:
        """One stored tensor in its stored type; CheckpointError when absent."""
        return self._unread(tensor).whole()

    def _unread(self, tensor: str) -> StoredTensor:
        if tensor not in self.files:
            raise CheckpointError(f"{self.folder}: tensor {tensor} is missing")
        return StoredTensor(self.files[tensor], tensor)

    def rows(self, tensor: str, begin: int, end: int) -> NDArray:
        """Rows `begin:end` of a stored tensor."""
        return self.files[tensor].rows(tensor, begin, end)

    def linear(self, module: str) -> QuantizedTensor | NDArray:
        """The weight `[out, in]` of a linear, the embedding or the head.

        A quantized matrix is a QuantizedTensor, any other an array in its stored type. Raises CheckpointError when the
        stored tensors contradict each other or a scale is not finite.
        """
        scheme = self.schemes.get(module)
        return self._quantized(module, scheme) if scheme else self.read(f"{module}.weight")

    def matrix(self, module: str) -> QuantizedTensor | StoredTensor:
        """As `linear`, but a matrix that is not quantized is not read yet."""
        scheme = self.schemes.get(module)
        return self._quantized(module, scheme) if scheme else self._unread(f"{module}.weight")

    def _quantized(self, module: str, scheme: QuantScheme) -> QuantizedTensor:
        try:
            tensor: QuantizedTensor = layout(self.layout).unpack(
                self.stored, module, self._linear_shapes[module], scheme
            )
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}", "download the checkpoint again") from error
        if not np.isfinite(tensor.scales32).all():
            raise CheckpointError(f"{self.folder}: {module} has a scale that is no finite number")
        return tensor

    @cached_property
    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        return self.config.all_matrices()

    @cached_property
    def stored(self) -> Stored:
        """The tensors as the layouts read them."""
        return Stored({name: file.entries[name] for name, file in self.files.items()}, self.read, self.quantization)

    @property
    def head(self) -> str:
        """Name of the head's 16-bit tensor: the embedding's when they are tied."""
        return f"{self.config.head_module}.weight"

    @property
    def is_quantized(self) -> bool:
        """Whether any linear is stored as codes."""
        return bool(self.schemes)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per weight over all parameters, scales included, as stored."""
        stored = sum(e.end - e.begin for e in self.stored_entries())
        return 8 * stored / self.config.num_parameters

    @property
    def linear_bits_per_weight(self) -> float:
        """Mean bits per weight of the decoder's linears, scales included.

        Embedding, head and norms do not count: this is the figure that a recipe's name promises.
        """
        bits = weights = 0.0
        for name, shape in self.config.all_linears().items():
            scheme, count = self.schemes.get(name), shape[0] * shape[1]
            each = scheme.bits_per_weight(shape) if scheme else 8 * self.entry(f"{name}.weight").dtype.itemsize
            bits, weights = bits + each * count, weights + count
        return bits / weights

    def stored_entries(self) -> Iterator[Entry]:
        """Entries of every tensor of the model, without a tied head's copy."""
        for tensor in self.files:
            if not (tensor == "lm_head.weight" and self.config.tie_word_embeddings):
                yield self.entry(tensor)

    def sidecars(self) -> list[Path]:
        """Tokenizer, generation and licence files that travel with the model byte for byte."""
        skipped = {"config.json", INDEX, MANIFEST, *_TOOLS}
        found = {path for pattern in _SIDECARS for path in self.folder.glob(pattern)}
        return sorted(path for path in found if path.is_file() and path.name not in skipped)

    @property
    def sha256(self) -> str:
        """Hash of the configuration and of every shard's bytes."""
        return self._hashing.result()

    def hash_ahead(self) -> None:
        """Start to compute `sha256` in the background.

        An error is raised later, when `sha256` is read.
        """
        _ = self._hashing

    @cached_property
    def _hashing(self) -> Future[str]:
        return beside(self._hash)

    def _hash(self) -> str:
        shards = sorted({file.path for file in self.files.values()})
        lines = [f"{path.name} {sha256_file(path)}\n" for path in (self.folder / "config.json", *shards)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder, 16-bit or quantized, and audit every tensor's name, shape and type.

    Raises CheckpointError naming the file or the tensor, what was found and what was wanted.
    """
    refuse_adapter(folder)
    raw = read_json(folder / "config.json", CheckpointError, "not a checkpoint folder?")
    config = parse_config(raw, str(folder / "config.json"))
    files = with_usual_names(folder, open_shards(folder), config)
    manifest, quantization = read_manifest(folder), quantization_config.quantization_of(folder, raw, files)
    checkpoint = Checkpoint(folder.absolute(), config, raw, files, {})
    if quantization and isinstance(manifest.get("tensors"), dict):
        stored_as = str(manifest.get("layout", DEFAULT))
        checkpoint = replace(checkpoint, schemes=_schemes(folder, manifest["tensors"]), layout=stored_as)
        quantization = {}
    elif quantization:
        checkpoint = replace(checkpoint, quantization=quantization)
        where = str(folder / "config.json")
        stored_as, schemes = quantization_config.read_schemes(where, checkpoint.stored, config.all_matrices())
        checkpoint = replace(checkpoint, schemes=schemes, layout=stored_as)
    _audit(checkpoint)
    if not quantization:
        return checkpoint
    try:
        schemes, reordered = quantization_config.settle(stored_as, checkpoint.stored, schemes, config.all_matrices())
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return replace(checkpoint, schemes=schemes, reordered=reordered)


def _schemes(folder: Path, tensors: Mapping[str, Any]) -> dict[str, QuantScheme]:
    """Schemes per module, from our manifest."""
    schemes = {}
    for name, item in tensors.items():
        if not isinstance(item, dict) or not isinstance(item.get("scheme"), dict):
            raise CheckpointError(f"{folder / MANIFEST}: {name} has no scheme")
        schemes[name] = QuantScheme.from_dict(item["scheme"], f"{folder / MANIFEST}, {name}")
    return schemes


def _audit(checkpoint: Checkpoint) -> None:
    expected, packed = checkpoint.config.tensor_shapes(), dict[str, np.dtype]()
    for module, scheme in checkpoint.schemes.items():
        shape = expected.pop(f"{module}.weight", None)
        if shape is None or len(shape) != 2:
            raise CheckpointError(f"{checkpoint.folder / MANIFEST}: {module} is no linear of this model")
        specs = _specs(checkpoint, module, (shape[0], shape[1]), scheme)
        expected.update({name: spec[1] for name, spec in specs.items()})
        packed.update({name: spec[0] for name, spec in specs.items()})
    for name, shape in expected.items():
        if name not in checkpoint.files:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name} {list(shape)} is missing")
        found = checkpoint.entry(name)
        if found.shape != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name} has shape {list(found.shape)}, config.json asks for {list(shape)}"
            )
        wanted = (packed[name],) if name in packed else _FLOATS
        if found.dtype not in wanted:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name} is stored as {found.dtype}; "
                f"{' or '.join(dtype.name for dtype in wanted)} was expected"
            )
    for name in checkpoint.files:
        tied_copy = name == "lm_head.weight" and checkpoint.config.tie_word_embeddings
        if name not in expected and not tied_copy and not name.endswith(_IGNORED):
            raise CheckpointError(f"{checkpoint.folder}: tensor {name} belongs to no part of a Qwen3 model")
        if tied_copy and checkpoint.config.head_module in checkpoint.schemes:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is stored beside a quantized embedding, which config.json ties it to",
                "set tie_word_embeddings to false in config.json if it is a head of its own",
            )
        if tied_copy:
            _check_tied(checkpoint)


def _specs(checkpoint: Checkpoint, module: str, shape: tuple[int, int], scheme: QuantScheme) -> dict[str, Spec]:
    """Types and shapes of the tensors that a quantized linear must be stored as.

    For another tool's folder they are what that tool wrote, as far as the layout allows it.
    """
    stored = checkpoint.stored if checkpoint.quantization else None
    try:
        scheme.check_shape(module, shape)
        return layout(checkpoint.layout).specs(module, shape, scheme, stored)
    except RecipeError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error


def _check_tied(checkpoint: Checkpoint, rows: int = 4096) -> None:
    """Refuse a tied head whose stored copy differs from the embedding.

    Some trainers keep an fp32 copy, so both are compared in the narrower of their types.
    """
    vocab = checkpoint.config.vocab_size
    if checkpoint.entry("lm_head.weight").shape != checkpoint.entry(checkpoint.head).shape:
        raise CheckpointError(f"{checkpoint.folder}: lm_head.weight is tied but its shape is not the embedding's")
    for begin in range(0, vocab, rows):
        end = min(begin + rows, vocab)
        head, embedding = (checkpoint.rows(name, begin, end) for name in ("lm_head.weight", checkpoint.head))
        narrower = min(head.dtype, embedding.dtype, key=lambda dtype: dtype.itemsize)
        with np.errstate(over="ignore"):
            same = head.astype(narrower).tobytes() == embedding.astype(narrower).tobytes()
        if not same:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json ties lm_head to the embedding, but the stored rows "
                f"{begin}..{end - 1} differ",
                "set tie_word_embeddings to false in config.json if the head was trained on its own",
            )
