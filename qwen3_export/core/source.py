"""SOURCE on the command line, as a checkpoint folder.

It is a local path, `reference-model`, or a hub id.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.resources import resource
from qwen3_export.errors import InputError, MissingRuntimeError

REFERENCE_MODEL = "reference-model"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# A name that ends so was meant as a path: no question for the hub.
_FILES = (".gguf", ".onnx", ".safetensors")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*"]


def open_source(spec: str) -> Checkpoint:
    """Open a SOURCE; raises InputError, CheckpointError or, for an unreachable hub, MissingRuntimeError."""
    return open_checkpoint(locate(spec))


def locate(spec: str) -> Path:
    """The folder that a SOURCE names.

    A hub id is downloaded, or found in the local cache.
    """
    if spec == REFERENCE_MODEL:
        return resource("calibration") / REFERENCE_MODEL
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{spec} is a file, a checkpoint folder was expected", _hint_for(path))
    if _HUB_ID.fullmatch(spec) and path.suffix not in _FILES:
        return _download(spec)
    if path.suffix in _FILES:
        raise InputError(f"{spec}: no such file", "check the path")
    raise InputError(
        f"{spec}: no such folder", f"give a local folder, a hub id such as Qwen/Qwen3-0.6B, or {REFERENCE_MODEL}"
    )


def _hint_for(path: Path) -> str:
    """What to give in place of a file."""
    if path.suffix in (".gguf", ".onnx"):
        return "an artifact is no source: give the checkpoint that it was made from"
    inside = (path.parent / "config.json").is_file()
    return f"give {path.parent}" if inside else "give the folder with config.json and the .safetensors files"


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_WANTED))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"{repository}: neither a local folder nor a repository on the hub") from error
    except RuntimeError as error:
        # Its cache lies in the user's home, and there is none.
        raise MissingRuntimeError(
            f"{repository}: neither a local folder, nor is there a place for the hub's files ({error})",
            "set HF_HOME to a folder for them",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        # huggingface_hub reports an unreachable hub, offline mode and an empty cache in several classes.
        raise MissingRuntimeError(
            f"{repository}: no such folder, not in the hub's local cache, and the hub cannot be reached",
            "check the network, or download the folder elsewhere and give its path",
        ) from error
