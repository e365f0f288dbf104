"""Activations on the disk: rows come back bit for bit, and files that nobody needs are written over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwen3_export.errors import InputError
from qwen3_export.model.block import State
from qwen3_export.model.workers import workers
from qwen3_export.solve.calibration.activations import SampleFile, SpareFiles
from qwen3_export.solve.calibration.block_states import BlockStates


def test_rows_of_a_file_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    file = SampleFile(tmp_path / "a.samples", (2, 3), torch.float32)
    rows = torch.randn(5, 2, 3)
    for row in (3, 0, 4, 1, 2):
        file.write(row, rows[row])
    assert all(torch.equal(file.read(row), rows[row]) for row in range(5))
    with pytest.raises(InputError, match="sample 5 is not there"):
        file.read(5)
    file.keep_as(tmp_path / "b.samples")
    file.close(remove=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b.samples"], "what was kept is its owner's to delete"
    again = SampleFile(tmp_path / "b.samples", (2, 3), torch.float32)
    assert all(torch.equal(again.read(row), rows[row]) for row in range(5))
    assert (tmp_path / "b.samples").stat().st_size == 5 * 6 * 4
    again.close(remove=True)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_to_last_goes_to_the_disk_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("qwen3_export.solve.calibration.activations._EARLY", 100)
    monkeypatch.setattr(os, "fsync", flushed.append)
    for early in (False, True):
        file = SampleFile(tmp_path / "a.samples", (10,), early=early)
        for row in range(20):
            file.write(row, torch.full((10,), float(row)))
        assert bool(flushed) == early
        file.close(remove=True)


def test_what_could_not_be_flushed_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports it once, to the flush that was begun early."""
    errors = [OSError(28, "No space left on device")]

    def flush(_: int) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr("qwen3_export.solve.calibration.activations._EARLY", 40)
    monkeypatch.setattr(os, "fsync", flush)
    file = SampleFile(tmp_path / "a.samples", (10,), early=True)
    file.write(0, torch.zeros(10))
    with pytest.raises(OSError, match="No space left"):
        file.keep_as(tmp_path / "b.samples")
    file.close(remove=True)
    assert not list(tmp_path.iterdir())


def test_states_keep_fields_of_every_type_and_drop_what_is_gone(tmp_path: Path) -> None:
    states = BlockStates(tmp_path, 4)
    with workers(2) as pool:
        states.advance(lambda row, _: {"x": torch.full((2,), float(row)), "n": torch.tensor([row])}, pool)
        files = {path.name for path in tmp_path.iterdir()}
        states.advance(lambda row, state: {"x": state["x"] * 2, "n": state["n"]}, pool)
        assert len(files & {path.name for path in tmp_path.iterdir()}) == 1
        assert [state["x"].tolist() for state in map(states.read, range(4))] == [[2.0 * row] * 2 for row in range(4)]
        assert [int(states.read(row)["n"]) for row in range(4)] == [0, 1, 2, 3]
        assert states.read(0)["n"].dtype == torch.int64
        states.advance(lambda row, state: {"x": state["x"]}, pool)
        assert set(states.read(0)) == {"x"}
    states.close()
    assert not list(tmp_path.iterdir())


def test_idle_fields_are_neither_read_nor_lost(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def step(row: int, state: State) -> State:
        seen.append(set(state))
        return {"x": state["x"] + 1}

    states = BlockStates(tmp_path, 3)
    with workers(2) as pool:
        states.advance(lambda row, _: {"x": torch.zeros(2), "residual": torch.full((2,), float(row))}, pool)
        states.advance(step, pool, idle=("residual", "absent"))
        assert seen == [{"x"}] * 3
        assert [states.read(row)["residual"].tolist() for row in range(3)] == [[float(row)] * 2 for row in range(3)]
        assert all(torch.equal(states.read(row, ("x",))["x"], torch.ones(2)) for row in range(3))
        assert set(states.read(0, ("x",))) == {"x"}
        states.advance(step, pool)
        assert set(states.read(0)) == {"x"}
    states.close()


def write(path: Path, size: int, byte: bytes = b"a") -> Path:
    path.write_bytes(byte * size)
    return path


def test_a_file_that_was_put_is_found_again_by_its_size(tmp_path: Path) -> None:
    spare, found = SpareFiles(tmp_path / "spare"), tmp_path / "found"
    spare.put(write(tmp_path / "large", 800, b"l"))
    spare.put(write(tmp_path / "small", 300, b"s"))
    spare.put(write(tmp_path / "second", 300, b"t"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spare"]
    spare.find(found, 500)
    assert not found.exists()
    spare.find(found, 800)
    assert found.read_bytes() == b"l" * 800
    for _ in range(2):
        spare.find(found, 300)
        assert found.read_bytes() in (b"s" * 300, b"t" * 300)
    found.unlink()
    for size in (300, 800):
        spare.find(found, size)
        assert not found.exists(), "what was taken is no longer there"
    assert not list((tmp_path / "spare").iterdir())


def test_a_new_run_empties_the_spare(tmp_path: Path) -> None:
    before = SpareFiles(tmp_path / "spare")
    before.put(write(tmp_path / "left", 300))
    after = SpareFiles(tmp_path / "spare")
    assert not list((tmp_path / "spare").iterdir())
    after.find(tmp_path / "found", 300)
    assert not (tmp_path / "found").exists()


def test_states_write_over_the_files_on_the_spare(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    spare = SpareFiles(tmp_path / "spare")
    with workers(2) as pool:
        for turn in range(3):
            states = BlockStates(folder, 4, spare_files=spare)
            states.advance(lambda row, _, turn=turn: {"x": torch.full((3,), float(row + turn))}, pool)
            states.advance(lambda _, state: {"x": state["x"] * 2, "n": torch.ones(5)}, pool)
            assert [states.read(row)["x"].tolist() for row in range(4)] == [
                [2.0 * (row + turn)] * 3 for row in range(4)
            ]
            states.close()
            assert not list(folder.iterdir())
            # Two of x at a time and one of n, however often.
            sizes = sorted(path.stat().st_size for path in (tmp_path / "spare").iterdir())
            assert sizes == [4 * 3 * 4] * 2 + [4 * 5 * 4]


def test_a_file_that_is_another_s_is_not_put_on_the_spare(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    spare, before = SpareFiles(tmp_path / "spare"), SampleFile(tmp_path / "hidden.samples", (3,))
    for row in range(2):
        before.write(row, torch.full((3,), float(row)))
    before.lasting = True
    states = BlockStates(folder, 2, {"residual": before}, spare)
    with workers(1) as pool:
        states.advance(lambda _, state: {"residual": state["residual"] + 1}, pool)
    kept = states.take("residual")
    kept.keep_as(tmp_path / "after.samples")
    assert torch.equal(kept.read(1), torch.full((3,), 2.0))
    kept.close()
    again = SampleFile(tmp_path / "hidden.samples", (3,))
    assert torch.equal(again.read(1), torch.ones(3))
    again.close()
    assert not list((tmp_path / "spare").iterdir())
