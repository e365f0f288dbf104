"""Safetensors shards of a checkpoint folder: one file, or several with an index."""

from __future__ import annotations

from pathlib import Path

from qwen3_export.core.files import read_object
from qwen3_export.core.tensorfile import TensorFile
from qwen3_export.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_shards(folder: Path) -> dict[str, TensorFile]:
    """`{tensor name: shard}` of a checkpoint folder.

    Where both exist the single file is read, as in transformers. Raises CheckpointError when a shard or a tensor that
    the index names is missing, or when a shard would lie outside of the folder.
    """
    if (folder / SINGLE).exists():
        file = TensorFile(folder / SINGLE)
        return dict.fromkeys(file.entries, file)
    if not (folder / INDEX).exists():
        raise CheckpointError(
            f"{folder}: neither {SINGLE} nor {INDEX} is there", "only safetensors checkpoints are read"
        )
    weight_map = read_object(folder / INDEX, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: no 'weight_map' object in it")
    shards: dict[str, TensorFile] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{folder / INDEX}: tensor {tensor} points outside of the folder: {name!r}")
        if name not in shards:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: shard is missing", "download the checkpoint again")
            shards[name] = TensorFile(folder / name)
        if tensor not in shards[name].entries:
            raise CheckpointError(f"{folder / name}: tensor {tensor} is missing, though the index promises it")
    return {tensor: shards[name] for tensor, name in weight_map.items()}
