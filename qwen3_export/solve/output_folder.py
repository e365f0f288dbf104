"""The quantized folder while it is being written, and how it is finished.

    OUTPUT.partial/model-00001-of-000NN.safetensors   embedding; final norm and head where the head stays as it is
                   model-0000K-of-000NN.safetensors   block K - 2, written when it is solved
                   model-000NN-of-000NN.safetensors   final norm and a quantized head, written last
                   state/progress.json                what the run is, which blocks are done
                   state/quantized-0007.samples       hidden states before block 7, unless `--scratch` has them

Finishing drops `state/`, adds configuration, index, sidecars and manifest; one rename makes OUTPUT.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.layouts import layout
from qwen3_export.core.manifest import sha256_file, to_json, write_manifest
from qwen3_export.core.outputs import clear_partial, write_atomic
from qwen3_export.core.qwen3 import EMBEDDING, FINAL_NORM, HEAD, block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.shards import INDEX
from qwen3_export.core.tensorfile import Spec, TensorFile, TensorFileWriter
from qwen3_export.errors import CheckpointError, ClusterError, ExportError, InputError, StateError
from qwen3_export.solve.job import SolvedBlock, SolvedLinear
from qwen3_export.solve.scratch import bring_activations, drop_activations

STATE, PROGRESS = "state", "progress.json"
_OVER = "--no-resume starts over"
_SAID = {"matmul": "kind of processor", "version": "version of qwen3-export"}


def resumable(state: Path, error: BaseException) -> bool:
    """Whether a stopped run can go on: blocks are done, and it may succeed.

    After an error of the input, not of a cluster, the next run would fail too. A damaged state is kept, so that the
    user can decide.
    """
    if isinstance(error, StateError):
        return True
    return (state / PROGRESS).is_file() and (isinstance(error, ClusterError) or not isinstance(error, InputError))


def read_progress(path: Path) -> dict[str, Any]:
    """What an unfinished run recorded; StateError when it is damaged or something else."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("no file")
        saved = json.loads(path.read_bytes())
        if not isinstance(saved, dict):
            raise ValueError("no object")
        saved = {"outer": {}, "scratch": "", **saved}
        for key, kind in {"identity": dict, "blocks": list, "outer": dict, "scratch": str}.items():
            if not isinstance(saved.get(key), kind):
                raise ValueError(f"no {key}")
        for block in saved["blocks"]:
            if not all(type(count) is int for count in block["expert_tokens"]):
                raise ValueError("no tokens of experts")
        for record in (saved["outer"], *(block["linears"] for block in saved["blocks"])):
            for item in record.values():
                QuantScheme.from_dict(item["scheme"])
                if not isinstance(item["method"], str) or not isinstance(item["error"], float | int):
                    raise ValueError("a matrix without method or error")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ExportError, OSError) as error:
        raise StateError(f"{path} cannot be read ({error})", _OVER) from error
    return saved


@dataclass(frozen=True)
class QuantizedFolder:
    """`OUTPUT.partial/` of one run; `identity` is everything that decides its bytes beside the checkpoint.

    With `head_apart` the head is quantized by itself and has a shard of its own. `activations` is a folder for
    activations on another disk.
    """

    folder: Path
    checkpoint: Checkpoint
    layout: str
    identity: Mapping[str, Any]
    head_apart: bool = False
    activations: Path | None = None

    @property
    def state(self) -> Path:
        """Where progress is kept until the run is done."""
        return self.folder / STATE

    @property
    def scratch(self) -> Path:
        """Where activations are kept until the run is done."""
        return self.activations or self.state

    def resume(self) -> dict[str, Any]:
        """Results of an earlier run's finished blocks, embedding and head.

        Raises InputError when that run was another.
        """
        path = self.state / PROGRESS
        if not os.path.lexists(path):
            self._clear()
            return {"blocks": [], "outer": {}}
        saved = read_progress(path)
        for key, value in self._identity().items():
            if saved["identity"].get(key) != value:
                raise StateError(
                    f"{self.folder} holds an unfinished run with another {_SAID.get(key, key)}",
                    "repeat that run's arguments to finish it, or --no-resume to start over",
                )
        self._check_shards(path, saved)
        found = {"blocks": list(saved["blocks"]), "outer": dict(saved["outer"])}
        if bring_activations(Path(saved["scratch"] or self.state), self.scratch, self.state):
            self.save_progress(found)
        return found

    def _check_shards(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Raise StateError where a finished shard is missing or not whole."""
        done = len(saved["blocks"])
        if done > self.checkpoint.config.num_layers:
            raise StateError(f"{path}: {done} finished blocks, the model has fewer", _OVER)
        for layer in range(-1, done) if done else ():
            try:
                TensorFile(self.shard(layer))
            except CheckpointError as error:
                raise StateError(f"what counts as finished is damaged: {error}", _OVER) from error

    def _identity(self) -> dict[str, Any]:
        return {"source": self.checkpoint.sha256, **self.identity}

    def start_over(self) -> None:
        """Forget an earlier run."""
        self._clear()

    def _clear(self) -> None:
        drop_activations(self.state / PROGRESS)
        clear_partial(self.folder)
        self.state.mkdir()
        if self.activations is not None:
            clear_partial(self.activations)

    def shard(self, layer: int) -> Path:
        """Name of a block's shard.

        Layer -1 stands for the tensors outside of the blocks, the layer after the last block for a quantized head.
        """
        total = self.checkpoint.config.num_layers + 1 + self.head_apart
        return self.folder / f"model-{layer + 2:05d}-of-{total:05d}.safetensors"

    def write_outer(self, embedding: SolvedLinear | None = None) -> None:
        """Write the embedding, and final norm and head unless the head is quantized apart."""
        specs: dict[str, Spec] = {}
        linears = {} if embedding is None else {EMBEDDING: embedding}
        for name in self.checkpoint.config.outer_shapes():
            module = name.removesuffix(".weight")
            if module in linears:
                specs.update(self._packed(linears[module]))
            elif not (self.head_apart and (module == HEAD or name == FINAL_NORM)):
                specs[name] = self._stored(name)
        self._write(self.shard(-1), specs, SolvedBlock(linears))

    def write_head(self, head: SolvedBlock) -> None:
        """Write the shard of a quantized head and of the norm before it."""
        specs = {FINAL_NORM: self._stored(FINAL_NORM), **self._packed(head.linears[HEAD])}
        self._write(self.shard(self.checkpoint.config.num_layers), specs, head)

    def _packed(self, linear: SolvedLinear) -> dict[str, Spec]:
        tensor = linear.solved.tensor
        found: dict[str, Spec] = layout(self.layout).specs(tensor.name, tensor.shape, tensor.scheme)
        return found

    def write_block(self, layer: int, solved: SolvedBlock) -> None:
        """Write a block's shard with its solved linears packed.

        All other tensors are copied byte for byte, unless a fold has changed them.
        """
        linears = solved.linears
        prefix, config = block_name(layer), self.checkpoint.config
        specs: dict[str, Spec] = {}
        for name in (*config.other_shapes(layer), *config.linear_shapes(layer)):
            if f"{prefix}.{name}" in linears:
                specs.update(self._packed(linears[f"{prefix}.{name}"]))
            else:
                specs[f"{prefix}.{name}.weight"] = self._stored(f"{prefix}.{name}.weight")
        self._write(self.shard(layer), specs, solved)

    def _stored(self, name: str) -> Spec:
        entry = self.checkpoint.entry(name)
        return entry.dtype, entry.shape

    def _write(self, path: Path, specs: dict[str, Spec], solved: SolvedBlock) -> None:
        beside = path.with_suffix(".new")
        with TensorFileWriter(beside, specs) as writer:
            packed: dict[str, Any] = {}
            for name in specs:
                module = name.rpartition(".")[0]
                if module in solved.linears:
                    if name not in packed:
                        packed = layout(self.layout).pack(solved.linears[module].solved.tensor)
                    writer.write(name, packed[name])
                elif name in solved.replaced:
                    writer.write(name, solved.replaced[name])
                else:
                    writer.copy(name, self.checkpoint.files[name])
        beside.replace(path)

    def save_progress(self, found: Mapping[str, Any]) -> None:
        """Record what is finished, after its files are on the disk."""
        # Without indentation, which takes a hundred times as long: the file is written again for every block.
        place = {} if self.activations is None else {"scratch": str(self.activations.absolute())}
        write_atomic(self.state / PROGRESS, json.dumps({"identity": self._identity(), **place, **found}))

    def finish(self, recipe: Recipe, manifest: Mapping[str, Any], schemes: Mapping[str, QuantScheme]) -> None:
        """Add configuration, index, sidecars and manifest, and drop the working state."""
        shards = [self.shard(layer) for layer in range(-1, self.checkpoint.config.num_layers + self.head_apart)]
        write_index(self.folder, shards)
        config = readable_config(self.checkpoint.raw_config)
        config["quantization_config"] = layout(self.layout).config(schemes, list(self.checkpoint.config.all_linears()))
        (self.folder / "config.json").write_text(to_json(config), encoding="utf-8")
        sidecars = {}
        for path in self.checkpoint.sidecars():
            shutil.copyfile(path, self.folder / path.name)
            sidecars[path.name] = sha256_file(path)
        write_manifest(self.folder, "quantized-checkpoint", {**manifest, "sidecars": sidecars})
        shutil.rmtree(self.state)


def write_index(folder: Path, shards: list[Path]) -> None:
    """`model.safetensors.index.json` of these shards."""
    files = [TensorFile(path) for path in shards]
    weight_map = {name: file.path.name for file in files for name in file.entries}
    size = sum(entry.end - entry.begin for file in files for entry in file.entries.values())
    (folder / INDEX).write_text(to_json({"metadata": {"total_size": size}, "weight_map": weight_map}))


def readable_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that both transformers 4 and 5 read correctly.

    transformers 4 silently takes rope_theta 10000 when there is only `rope_parameters`, and 128 experts when there is
    only `num_local_experts`.
    """
    config = dict(raw)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        config.setdefault("rope_theta", rope.get("rope_theta"))
        scaled = rope.get("rope_type", "default") != "default"
        config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None)
    elif "rope_theta" in config:
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"], "rope_type": kind}
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        config["dtype"] = config["torch_dtype"] = dtype
    return config
