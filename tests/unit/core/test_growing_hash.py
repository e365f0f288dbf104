"""The hash of a file in the making is `hashlib`'s of the whole file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core import growing_hash
from qwen3_export.core.growing_hash import GrowingHash


@pytest.mark.parametrize("sizes", [(), (0,), (1, 70_000, 3), (5_000_000, 1)])
def test_it_is_hashlibs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    monkeypatch.setattr(growing_hash, "_FLUSHED", 1 << 16)
    path, random = tmp_path / "data", np.random.default_rng(0)
    with path.open("wb") as file:
        growing = GrowingHash(path)
        for size in sizes:
            file.write(random.bytes(size))
            file.flush()
            growing.wrote(file.tell())
    growing.finish()
    assert growing.result() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_bytes_that_were_not_announced_are_not_hashed(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"done, and more")
    growing = GrowingHash(path)
    growing.wrote(4)
    growing.finish()
    assert growing.result() == hashlib.sha256(b"done").hexdigest()


def test_what_goes_wrong_is_raised_by_the_result(tmp_path: Path) -> None:
    growing = GrowingHash(tmp_path / "absent")
    growing.finish()
    with pytest.raises(FileNotFoundError):
        growing.result()
