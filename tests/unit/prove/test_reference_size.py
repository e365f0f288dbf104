"""The portable reference: small at the largest vocabulary, tight at the k that is shipped, and mergeable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.tensorfile import TensorFile, write_tensors
from qwen3_export.errors import InputError
from qwen3_export.prove.drift import sample_drift
from qwen3_export.prove.merging import merge_references
from qwen3_export.prove.original import TOP_K, write_reference
from qwen3_export.prove.reference import ReferenceFile, Truth, answer_specs, full_truth, partial_truth, top_of
from qwen3_export.prove.statistics import SampleDrift
from qwen3_export.prove.tail import TAIL_SAMPLES
from qwen3_export.prove.validate import held_out
from qwen3_export.run.artifact import open_session
from qwen3_export.text.documents import load_documents, split_domain
from qwen3_export.text.samples import Samples
from tests.conftest import tiny_config, write_checkpoint

# Whole runs, many of them.
pytestmark = pytest.mark.slow


def test_thirty_two_blocks_at_the_real_vocabulary_stay_under_20_mb() -> None:
    specs = answer_specs(32 * 256, TOP_K, 151_936)
    answers = sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())
    tokens = 4 * 32 * 257
    assert answers + tokens + 200_000 < 20e6


@pytest.fixture(scope="module")
def answers(reference_folder: Path, quantized: Callable[[str], Path]) -> list[tuple[np.ndarray, Truth, np.ndarray]]:
    """Rows of held-out text, the original's full answers, and the logits of a 4-bit artifact."""
    rows = held_out(reference_folder, tokens=1500).ids
    original, artifact = open_session(reference_folder), open_session(quantized("rtn-w4a16-g128"))
    return [(ids, full_truth(original.prefill(ids), ids), artifact.prefill(ids)) for ids in rows]


def measured(answers: list[tuple[np.ndarray, Truth, np.ndarray]], k: int) -> SampleDrift:
    """KL, its bound and its variance at every position, from what a file of `k` tokens keeps."""
    found = [sample_drift(partial_truth(top_of(truth, k, ids)), logits, ids) for ids, truth, logits in answers]
    parts = [(drift.kl, drift.kl_bound, drift.kl_variance) for drift in found]
    kl, bound, variance = (np.concatenate(column) for column in zip(*parts, strict=True))
    return replace(found[0], kl=kl, kl_bound=bound, kl_variance=variance)


def test_what_a_file_keeps_gives_the_full_kl_and_a_bound_that_grows_with_k(answers) -> None:
    whole = np.concatenate([sample_drift(truth, logits, ids).kl for ids, truth, logits in answers])
    drifts = {k: measured(answers, k) for k in (16, 64, TOP_K)}
    for drift in drifts.values():
        assert (drift.kl_bound <= whole + 1e-5).all()
        assert (drift.kl_bound <= drift.kl + 1e-9).all()
        error = np.sqrt(drift.kl_variance.sum()) / len(whole)
        assert abs(drift.kl.mean() - whole.mean()) < 4 * error
    # The embedded model is small and unsure: a fifth of its probability lies beyond 64 tokens.
    shares = [drift.kl_bound.mean() / whole.mean() for drift in drifts.values()]
    assert shares == sorted(shares)
    assert shares[-1] > 0.85
    shipped = drifts[TOP_K]
    assert shipped.kl.mean() == pytest.approx(whole.mean(), rel=0.01)
    assert np.sqrt(shipped.kl_variance.sum()) / whole.sum() < 0.005


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5, 4.0])
def test_the_estimate_has_no_bias_whatever_the_drift(noise: float) -> None:
    random = np.random.default_rng(3)
    original = 2.5 * random.standard_normal((40, 600), np.float32)
    artifact = original + noise * random.standard_normal(original.shape, np.float32)
    whole = sample_drift(full_truth(original, np.zeros(40, np.int32)), artifact, np.zeros(40, np.int32)).kl.mean()
    # The row's tokens seed the draws: many rows of one distribution are many draws.
    rows = [np.full(40, seed, np.int32) for seed in range(60)]
    drifts = [measured([(ids, full_truth(original, ids), artifact)], 20) for ids in rows]
    means = np.array([drift.kl.mean() for drift in drifts])
    assert abs(means.mean() - whole) < 4 * means.std() / np.sqrt(len(means)) + 1e-7
    claimed = np.mean([np.sqrt(drift.kl_variance.sum()) / 39 for drift in drifts])
    assert means.std() <= 1.2 * claimed + 1e-7


def test_files_of_the_first_version_are_read_and_give_their_bound(
    parts: tuple[Checkpoint, list[Path], Path], tmp_path: Path
) -> None:
    _, paths, together = parts
    file = TensorFile(together)
    kept = {name: file.read(name) for name in file.entries if name not in ("tail_ids", "tail_logprobs")}
    old = tmp_path / "old.safetensors"
    write_tensors(old, kept.items(), {**file.metadata, "format": "qwen3-export reference 1"})
    first, second = ReferenceFile(old), ReferenceFile(together)
    assert (first.is_lower_bound, second.is_lower_bound) == (True, False)
    ids = first.samples.ids[0]
    logits = np.random.default_rng(0).standard_normal((len(ids), 320)).astype(np.float32)
    bound, estimate = (sample_drift(reference.truth(0), logits, ids) for reference in (first, second))
    assert np.array_equal(bound.kl, estimate.kl_bound)
    assert bound.kl_bound is None
    with pytest.raises(InputError, match="format"):
        merge_references([old, paths[0]], tmp_path / "mixed.safetensors")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, list[Path], Path]:
    """Two references of one model over different rows, and one over both."""
    from qwen3_export.core.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("parts")
    checkpoint = open_checkpoint(write_checkpoint(folder / "tiny", tiny_config()))
    random = np.random.default_rng(1)
    ids = [random.integers(0, 320, length).astype(np.int32) for length in (40, 30, 20)]
    paths = [folder / "a.safetensors", folder / "b.safetensors", folder / "all.safetensors"]
    chosen = [((ids[0], ids[1]), ("math", "code")), ((ids[2],), ("art",)), (tuple(ids), ("math", "code", "art"))]
    for path, (rows, domains) in zip(paths, chosen, strict=True):
        write_reference(checkpoint, Samples(rows, domains), path, 8, force=False)
    return checkpoint, paths[:2], paths[2]


def test_merged_references_are_one_reference(parts: tuple[Checkpoint, list[Path], Path], tmp_path: Path) -> None:
    _, paths, together = parts
    result = merge_references(paths, tmp_path / "merged.safetensors")
    merged, whole = ReferenceFile(tmp_path / "merged.safetensors"), ReferenceFile(together)
    assert merged.samples.sha256 == whole.samples.sha256
    assert merged.samples.domains == whole.samples.domains
    assert (result["rows"], result["positions"], result["domains"]) == (3, 87, ["art", "code", "math"])
    for row in range(3):
        a, b = merged.truth(row), whole.truth(row)
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.logprobs, b.logprobs)
        assert np.array_equal(a.drawn_ids, b.drawn_ids)
        assert a.drawn_ids.shape == (len(whole.samples.ids[row]) - 1, TAIL_SAMPLES)
    assert len(merged.continuations.prompts) == 3


def test_what_does_not_belong_together_is_not_merged(
    parts: tuple[Checkpoint, list[Path], Path], tmp_path: Path
) -> None:
    checkpoint, paths, together = parts
    with pytest.raises(InputError, match="a row of it is also in"):
        merge_references([paths[0], together], tmp_path / "out")
    other = tmp_path / "other-k.safetensors"
    rows = Samples((np.arange(20, dtype=np.int32),), ("x",))
    write_reference(checkpoint, rows, other, 4, force=False)
    with pytest.raises(InputError, match="top_k is 4"):
        merge_references([paths[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_by_domain(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Some notes.")
    odd = tmp_path / "a=b.txt"
    odd.write_text("An odd name.")
    assert [d.domain for d in load_documents(f"physics={tmp_path / 'notes.txt'}")] == ["physics"]
    assert [d.domain for d in load_documents(str(odd))] == ["a=b"]
    assert split_domain("math=heldout") == ("math", "heldout")
    assert split_domain("heldout") == ("", "heldout")
