"""Batches with padding and prompts in pieces, driven in plain ONNX Runtime as a user of the folder would: every
row's logits are those of our torch forward pass on that row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.support import SAME, THREADS, YARN, OnnxFolder, logits, random_ids
from tests.conftest import tiny_config

FOLDERS = [("original", "ort"), ("gptq-w4a16-g32-asym", "ort"), ("gptq-w4a16-g128", "standard")]
LENGTHS, STEPS = (37, 20, 1), 3


class Batch:
    """Plain ONNX Runtime with the cache handed on, as a user of the folder would drive it."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self._names = [item.name for item in self._session.get_outputs()]
        self._cache: dict[str, NDArray] = {}

    def step(self, ids: NDArray, mask: NDArray, positions: NDArray) -> NDArray[np.float32]:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for item in self._session.get_inputs():
            if item.name.startswith("past"):
                empty = np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32)
                feeds[item.name] = self._cache.get(item.name, empty)
        values = dict(zip(self._names, self._session.run(self._names, feeds), strict=True))
        self._cache = {name.replace("present", "past_key_values"): value for name, value in values.items()}
        return values["logits"]


@pytest.fixture(scope="module")
def texts(rows: list[NDArray]) -> list[NDArray[np.int32]]:
    """Rows of different lengths, and what follows each of them."""
    return [rows[i % len(rows)][: length + STEPS] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(source: Callable[[str], Path], texts: list[NDArray]) -> Callable[[str], list[NDArray]]:
    """`alone(recipe)`: the torch forward pass of each row without the others."""
    return lambda name: logits(source(name), texts)


def decode(batch: Batch, mask: NDArray, texts: Sequence[NDArray], alone: Sequence[NDArray]) -> None:
    """Some tokens more, a one behind each row's mask, as Hugging Face's `generate` does."""
    for step in range(STEPS):
        mask = np.pad(mask, [(0, 0), (0, 1)], constant_values=1)
        positions = np.array(LENGTHS)[:, None] + step
        tokens = np.array([ids[length + step] for ids, length in zip(texts, LENGTHS, strict=True)])
        got = batch.step(tokens[:, None].astype(np.int64), mask, positions)
        wanted = np.stack([row[length + step] for row, length in zip(alone, LENGTHS, strict=True)])
        assert np.abs(got[:, 0] - wanted).max() < SAME


def padded(texts: Sequence[NDArray], side: str) -> tuple[NDArray, NDArray, NDArray]:
    """Token ids, mask and positions of the rows' first `LENGTHS` tokens; padding has position 1."""
    width = max(LENGTHS)
    places = [(width - n, 0) if side == "left" else (0, width - n) for n in LENGTHS]
    ids = np.stack([np.pad(ids[:n], place) for ids, n, place in zip(texts, LENGTHS, places, strict=True)])
    mask = np.stack([np.pad(np.ones(n, np.int64), place) for n, place in zip(LENGTHS, places, strict=True)])
    return ids.astype(np.int64), mask, np.where(mask, mask.cumsum(1) - 1, 1)


def check_rows(got: NDArray, mask: NDArray, alone: Sequence[NDArray]) -> None:
    for row, (length, truth) in enumerate(zip(LENGTHS, alone, strict=True)):
        assert np.abs(got[row][mask[row] == 1] - truth[:length]).max() < SAME


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "flavor"), FOLDERS)
def test_padded_batch_equals_its_rows_alone(
    onnx_folder: OnnxFolder, alone: Callable, texts: list[NDArray], name: str, flavor: str, side: str
) -> None:
    level = {"accuracy_level": 0} if flavor == "ort" else {}
    batch, truth = Batch(onnx_folder(name, flavor=flavor, **level).path), alone(name)
    ids, mask, positions = padded(texts, side)
    check_rows(batch.step(ids, mask, positions), mask, truth)
    decode(batch, mask, texts, truth)


def test_a_mask_that_counts_tokens_is_understood(
    onnx_folder: OnnxFolder, alone: Callable, texts: list[NDArray]
) -> None:
    """Right-padded rows whose mask has as many leading ones as the row has tokens, the new one among them."""
    batch, truth = Batch(onnx_folder("original").path), alone("original")
    ids, mask, positions = padded(texts, "right")
    check_rows(batch.step(ids, mask, positions), mask, truth)
    lengths, width = np.array(LENGTHS), max(LENGTHS)
    mask = (np.arange(width + 1) <= lengths[:, None]).astype(np.int64)
    tokens = np.array([ids[n] for ids, n in zip(texts, LENGTHS, strict=True)], np.int64)
    step = batch.step(tokens[:, None], mask, lengths[:, None])
    assert np.abs(step[:, 0] - np.stack([row[n] for row, n in zip(truth, LENGTHS, strict=True)])).max() < SAME


def test_left_padded_prompts_token_by_token(onnx_folder: OnnxFolder, alone: Callable, texts: list[NDArray]) -> None:
    """A row is all padding at first: nothing of it may stay in the cache."""
    batch, truth = Batch(onnx_folder("original").path), alone("original")
    ids, mask, positions = padded(texts, "left")
    pieces = [batch.step(ids[:, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1]) for i in range(ids.shape[1])]
    check_rows(np.concatenate(pieces, 1), mask, truth)
    decode(batch, mask, texts, truth)


def test_pieces_of_a_batch_are_refused_by_ort_and_right_in_standard(
    onnx_folder: OnnxFolder, alone: Callable, texts: list[NDArray]
) -> None:
    ids, mask, positions = padded(texts, "left")
    cut, width = 19, ids.shape[1]
    for flavor in ("ort", "standard"):
        batch = Batch(onnx_folder("original", flavor=flavor).path)
        first = batch.step(ids[:, :cut], mask[:, :cut], positions[:, :cut])
        if flavor == "ort":
            with pytest.raises(
                onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="batch_size must be 1"
            ):
                batch.step(ids[:, cut:], mask, positions[:, cut:])
            continue
        second = batch.step(ids[:, cut:], mask, positions[:, cut:])
        assert first.shape[1] + second.shape[1] == width
        check_rows(np.concatenate([first, second], 1), mask, alone("original"))


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_chunks_with_a_cache_equal_one_prefill(
    onnx_folder: OnnxFolder, source: Callable[[str], Path], rows: list[NDArray], flavor: str
) -> None:
    options = {"accuracy_level": 0} if flavor == "ort" else {"flavor": flavor}
    folder, ids = onnx_folder("gptq-w4a16-g32", **options).path, rows[0][:64].astype(np.int64)
    whole, batch, pieces = logits(source("gptq-w4a16-g32"), [rows[0][:64]])[0], Batch(folder), []
    for begin, end in ((0, 1), (1, 24), (24, 63), (63, 64)):
        mask, positions = np.ones((1, end), np.int64), np.arange(begin, end)[None]
        pieces.append(batch.step(ids[None, begin:end], mask, positions)[0])
    assert np.abs(np.concatenate(pieces) - whole).max() < SAME


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_long_text_beyond_yarns_original_context(make_checkpoint: Callable, tmp_path: Path, flavor: str) -> None:
    """600 positions of a model trained for 32 and stretched: a prompt, then a hundred tokens one by one."""
    config = tiny_config(rope_scaling={**YARN, "factor": 32.0}, max_position_embeddings=1024)
    source, ids = make_checkpoint(config), random_ids(600)
    export_onnx(open_checkpoint(source), tmp_path / "onnx", flavor=flavor)
    (truth,), batch, pieces = logits(source, [ids]), Batch(tmp_path / "onnx"), []
    for begin, end in ((0, 500), *((i, i + 1) for i in range(500, 600))):
        mask, positions = np.ones((1, end), np.int64), np.arange(begin, end)[None]
        pieces.append(batch.step(ids[None, begin:end].astype(np.int64), mask, positions)[0])
    assert np.abs(np.concatenate(pieces) - truth).max() < SAME


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_size_does_not_grow_with_the_context(make_checkpoint: Callable, tmp_path: Path, flavor: str) -> None:
    sizes = []
    for context in (128, 262_144):
        source = make_checkpoint(tiny_config(max_position_embeddings=context), name=str(context))
        export_onnx(open_checkpoint(source), tmp_path / f"{context}-onnx", flavor=flavor)
        sizes.append(
            sum((tmp_path / f"{context}-onnx" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        )
    assert abs(sizes[0] - sizes[1]) < 100
    # Far positions are exact: fp32 angles of a million radians.
    ids, far = random_ids(12), np.arange(262_100, 262_112)[None]
    got = Batch(tmp_path / "262144-onnx").step(ids[None].astype(np.int64), np.ones((1, 12), np.int64), far)
    (near,) = logits(tmp_path / "262144", [ids])
    assert np.abs(got[0] - near).max() < 0.1, "attention sees differences of positions alone, up to fp32's angles"
