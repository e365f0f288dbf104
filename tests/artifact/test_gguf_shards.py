"""GGUF files in shards: llama.cpp reads them, and an earlier output of the same name goes when they are complete."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.imatrix import Imatrix, ImatrixEntry, read_imatrix
from qwen3_export.errors import InputError
from qwen3_export.ship.gguf import Options, check_request, export_gguf, shards
from tests.artifact.support import logits, random_ids, tiny_with_tokenizer
from tests.cli.helpers import hashes
from tests.conftest import tiny_config, tiny_moe_config

DENSE = tiny_config(hidden_size=256, intermediate_size=512, head_dim=64)
MOE = tiny_moe_config(hidden_size=256, moe_intermediate_size=256, head_dim=64, num_experts=4)
IDS = [random_ids(48, 8185)]
# Names beside an output that are none of its shards.
OTHERS = ("m-00001-of-00005.gguf.txt", "xm-00001-of-00005.gguf", "m-1-of-5.gguf", "m-00006-of-00005.gguf", "m.gguf.old")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Checkpoint:
    return open_checkpoint(tiny_with_tokenizer(tmp_path_factory.mktemp("dense") / "dense", reference_folder, DENSE))


def test_llama_cpp_loads_shards(reference_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_with_tokenizer(tmp_path / "moe", reference_folder, MOE))
    whole = export_gguf(checkpoint, tmp_path / "whole.gguf", "q4_k_m")
    result = export_gguf(checkpoint, tmp_path / "model.gguf", "q4_k_m", options=Options(split_max_bytes=1_000_000))
    paths = sorted(tmp_path.glob("model-*.gguf"))
    count = len(paths)
    assert [path.name for path in paths] == [f"model-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    assert [item["path"] for item in result["files"]] == [path.name for path in paths]
    assert result["output"] == str(paths[0])
    assert count > 2
    headers = [gguf.GGUFReader(path) for path in paths]
    tensors = sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        values = [header.fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")]
        assert values == [number, count, tensors]
    assert not (tmp_path / "model.gguf").exists()
    assert sum(path.stat().st_size for path in paths[:-1]) > 0.5 * whole["files"][0]["bytes"]
    for mine, other in zip(logits(paths[0], IDS), logits(tmp_path / "whole.gguf", IDS), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_existing_shards_stop_the_export(dense: Checkpoint, tmp_path: Path) -> None:
    options = Options(split_max_bytes=1_000_000)
    export_gguf(dense, tmp_path / "model.gguf", "q8_0", options=options)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="exists already"):
        export_gguf(dense, tmp_path / "model.gguf", "q8_0", options=options)
    assert sorted(tmp_path.iterdir()) == before
    export_gguf(dense, tmp_path / "model.gguf", "q8_0", force=True, options=options)
    assert sorted(tmp_path.iterdir()) == before


def put(dense: Checkpoint, output: Path, limit: int | None, force: bool = False) -> set[str]:
    """Write an output and give the names of its files."""
    result = export_gguf(dense, output, "q8_0", force, options=Options(split_max_bytes=limit))
    return {item["path"] for item in result["files"]}


@pytest.mark.parametrize(("first", "then"), [(None, 2_500_000), (1_000_000, 2_500_000), (1_000_000, None)])
def test_an_output_in_another_number_of_shards_is_replaced(
    dense: Checkpoint, tmp_path: Path, first: int | None, then: int | None
) -> None:
    output = tmp_path / "m.gguf"
    for name in OTHERS:
        (tmp_path / name).write_text("mine")
    earlier = put(dense, output, first)
    before = hashes(tmp_path)
    for export in (
        lambda: put(dense, output, then),
        lambda: check_request(dense, "q8_0", Options(split_max_bytes=then), output),
    ):
        with pytest.raises(InputError, match=f"{min(earlier)} exists already"):
            export()
    assert hashes(tmp_path) == before
    check_request(dense, "q8_0", Options(split_max_bytes=then), output, force=True)
    assert hashes(tmp_path) == before
    later = put(dense, output, then, force=True)
    assert not earlier & later
    assert {path.name for path in tmp_path.iterdir()} == later | set(OTHERS)


def test_a_run_that_fails_keeps_the_earlier_output(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(dense, tmp_path / "m.gguf", 1_000_000)
    before, flush, flushed = hashes(tmp_path), shards.flush, list[Path]()

    def full(path: Path) -> None:
        flushed.append(path)
        if len(flushed) == 2:
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(shards, "flush", full)
    for limit in (1_000_000, 2_500_000, None):
        flushed[:] = [] if limit else [tmp_path]
        with pytest.raises(OSError, match="No space left"):
            put(dense, tmp_path / "m.gguf", limit, force=True)
        assert hashes(tmp_path) == before


def test_an_input_with_a_shards_name_is_kept(dense: Checkpoint, tmp_path: Path) -> None:
    matrix = tmp_path / "m-00001-of-00001.gguf"
    entry = ImatrixEntry(np.ones((1, 256), np.float32), np.ones(1, np.float32))
    Imatrix({"blk.0.attn_q.weight": entry}).write(matrix)
    before, options = matrix.read_bytes(), Options(importance=read_imatrix(matrix))
    with pytest.raises(InputError, match="is the input"):
        export_gguf(dense, tmp_path / "m.gguf", "q4_k_m", force=True, options=options)
    assert matrix.read_bytes() == before
