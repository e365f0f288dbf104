"""The portable reference: small at the largest vocabulary, tight at the k that is shipped, and mergeable."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import numpy as np
import pytest

from qwen3_export.cli import prove as commands
from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.errors import InputError
from qwen3_export.prove.drift import sample_drift
from qwen3_export.prove.merging import merge_references
from qwen3_export.prove.original import write_reference
from qwen3_export.prove.reference import ReferenceFile, Truth, answer_specs, full_truth, top_of
from qwen3_export.prove.validate import held_out
from qwen3_export.run.artifact import open_session
from qwen3_export.text.documents import load_documents, split_domain
from qwen3_export.text.samples import Samples
from tests.conftest import tiny_config, write_checkpoint

SHIPPED = int(inspect.signature(commands.reference).parameters["top_k"].default)


def test_thirty_two_blocks_at_the_real_vocabulary_stay_under_20_mb() -> None:
    specs = answer_specs(32 * 256, SHIPPED, 151_936)
    answers = sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())
    tokens = 4 * 32 * 257
    assert answers + tokens + 200_000 < 20e6


def test_the_bound_is_tight_and_grows_with_k(reference_folder: Path, quantized) -> None:
    rows = held_out(reference_folder, tokens=1500)
    original, artifact = open_session(reference_folder), open_session(quantized("rtn-w4a16-g128"))
    full, bounds = [], {k: [] for k in (16, 64, SHIPPED)}
    for ids in rows.ids:
        truth, logits = full_truth(original.prefill(ids), ids), artifact.prefill(ids)
        full.append(sample_drift(truth, logits, ids).kl)
        for k, found in bounds.items():
            top = top_of(truth, k)
            partial = Truth(top["top_logprobs"], top["next_logprob"], top["top_ids"], top["tail_logprob"])
            found.append(sample_drift(partial, logits, ids).kl)
    whole = np.concatenate(full)
    shares = [float(np.concatenate(found).mean() / whole.mean()) for found in bounds.values()]
    assert all((np.concatenate(found) <= whole + 1e-5).all() for found in bounds.values())
    assert shares == sorted(shares)
    # The embedded model is small and unsure: a fifth of its probability lies beyond 64 tokens.
    assert shares[-1] > 0.85


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
