"""Part files: the results of one piece of work, which other workers read.

    8 bytes: length of the header │ header: JSON, where {"array": n} stands for the n-th array │ the arrays' bytes

A file appears whole, by a rename. It holds no code, unlike a pickle. Reader and writer are the same version of this
package on machines of one kind: the run's identity ensures it.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_export.core.disk import naming
from qwen3_export.core.tensor import SCALE_TYPES
from qwen3_export.errors import StateError

_TYPES = {str(dtype): dtype for dtype in SCALE_TYPES.values()}


def write_parts(path: Path, parts: Any) -> int:
    """Write nested dicts, lists, numbers, strings, tensors and arrays; returns the size."""
    arrays: list[np.ndarray] = []
    tree = json.dumps({"tree": _packed(parts, arrays), "arrays": [[a.nbytes] for a in arrays]}).encode()
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
    with naming(beside), beside.open("wb") as file:
        file.write(len(tree).to_bytes(8, "little") + tree)
        for array in arrays:
            file.write(array.data)
    os.replace(beside, path)
    return 8 + len(tree) + sum(array.nbytes for array in arrays)


def read_parts(path: Path) -> Any:
    """Read what `write_parts` wrote; StateError when the file is damaged."""
    try:
        data = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:end]))
        places, begin = [], end
        for (size,) in header["arrays"]:
            places.append((begin, size))
            begin += size
        if begin != len(data):
            raise ValueError("it is cut off")
        return _unpacked(header["tree"], data, places)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} cannot be read ({error})", "--no-resume starts over") from error


def _packed(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        return {"dict": {key: _packed(item, arrays) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_packed(item, arrays) for item in value]}
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        dtype, device = str(tensor.dtype).removeprefix("torch."), value.device.type
        kind = {"torch": dtype, "shape": list(tensor.shape), "device": device}
        arrays.append(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8))
        return {"array": len(arrays) - 1, **kind}
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        arrays.append(array.reshape(-1).view(np.uint8))
        return {"array": len(arrays) - 1, "numpy": str(array.dtype), "shape": list(array.shape)}
    if isinstance(value, np.generic):
        return value.item()
    return value


def _unpacked(tree: Any, data: bytearray, places: list[tuple[int, int]]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "dict" in tree:
        return {key: _unpacked(item, data, places) for key, item in tree["dict"].items()}
    if "list" in tree:
        return [_unpacked(item, data, places) for item in tree["list"]]
    begin, size = places[tree["array"]]
    # A copy, so that the array is aligned to its element's size.
    piece, shape = np.frombuffer(data, np.uint8, size, begin).copy(), tree["shape"]
    if "torch" in tree:
        dtype = getattr(torch, tree["torch"])
        found = torch.from_numpy(piece).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        return found.to(tree["device"])
    return piece.view(_TYPES.get(tree["numpy"]) or np.dtype(tree["numpy"])).reshape(shape)
