"""Files that workers of a cluster write over together."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_export.cluster.board import Board
from qwen3_export.solve.cluster.spare_files import SharedSpareFiles


@pytest.fixture
def two(tmp_path: Path) -> tuple[SharedSpareFiles, SharedSpareFiles]:
    """The spare as two workers see it."""
    first, second = (SharedSpareFiles(tmp_path / "spare", lambda: True) for _ in range(2))
    return first, second


def made(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_that_both_put_is_found_once(two: tuple[SharedSpareFiles, ...], tmp_path: Path) -> None:
    old, new, other = made(tmp_path / "old", b"abcd"), tmp_path / "new", tmp_path / "other"
    for spare in two:
        spare.put(old)
    assert not old.exists()
    two[0].find(new, 4)
    two[1].find(other, 4)
    assert new.read_bytes() == b"abcd"
    assert not other.exists()
    assert not list((tmp_path / "spare").iterdir())


def test_only_a_file_of_the_right_size_is_found(two: tuple[SharedSpareFiles, ...], tmp_path: Path) -> None:
    two[0].put(made(tmp_path / "old", b"abcd"))
    two[1].find(tmp_path / "new", 40)
    assert not (tmp_path / "new").exists()


def test_what_another_worker_has_opened_is_left_alone(two: tuple[SharedSpareFiles, ...], tmp_path: Path) -> None:
    two[0].put(made(tmp_path / "old", b"abcd"))
    new = made(tmp_path / "new", b"mine")
    two[1].find(new, 4)
    assert new.read_bytes() == b"mine"
    two[1].find(tmp_path / "newer", 4)
    assert (tmp_path / "newer").read_bytes() == b"abcd"


def test_a_link_that_comes_too_late_gives_the_file_back(
    two: tuple[SharedSpareFiles, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen that nothing is there; the other is faster."""
    two[0].put(made(tmp_path / "old", b"abcd"))
    new = tmp_path / "new"
    plain: Callable[..., None] = os.link

    def late(source: Path, target: Path) -> None:
        made(new, b"mine")
        plain(source, target)

    monkeypatch.setattr("os.link", late)
    two[1].find(new, 4)
    assert new.read_bytes() == b"mine"
    assert [path.name[:2] for path in (tmp_path / "spare").iterdir()] == ["4-"]


def test_many_workers_share_one_file_at_each_path(tmp_path: Path) -> None:
    """Whoever comes first brings it; nobody's file is at two paths."""
    spares = [SharedSpareFiles(tmp_path / "spare", lambda: True) for _ in range(8)]
    for number in range(6):
        spares[0].put(made(tmp_path / f"old-{number}", b"%04d" % number))
    meet = threading.Barrier(8)

    def work(spare: SharedSpareFiles) -> None:
        for number in range(6):
            meet.wait()
            spare.find(tmp_path / f"new-{number}", 4)

    threads = [threading.Thread(target=work, args=(spare,)) for spare in spares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [tmp_path / f"new-{number}" for number in range(6)]
    assert sorted(path.read_bytes() for path in found) == [b"%04d" % number for number in range(6)]
    assert len({path.stat().st_ino for path in found}) == 6
    assert not list((tmp_path / "spare").iterdir())


def test_after_a_loss_files_are_deleted(tmp_path: Path) -> None:
    """A lost worker may still write to them."""
    board = Board()
    spare = SharedSpareFiles(tmp_path / "spare", lambda: asyncio.run(board.calm()))
    asyncio.run(board.begin(2, True))
    spare.put(made(tmp_path / "one", b"abcd"))
    asyncio.run(board.lost(1))
    spare.put(made(tmp_path / "two", b"efgh"))
    assert not (tmp_path / "two").exists()
    assert [path.read_bytes() for path in (tmp_path / "spare").iterdir()] == [b"abcd"]
    asyncio.run(board.begin(2, True))
    assert asyncio.run(board.calm())
    asyncio.run(board.begin(2))
    assert not asyncio.run(board.calm())
