"""The portable reference: what is read back is what the original said; a damaged file never is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.tensorfile import TensorFile, write_tensors
from qwen3_export.errors import CheckpointError, InputError
from qwen3_export.model.decoder import Decoder
from qwen3_export.prove.original import LiveReference, write_reference
from qwen3_export.prove.reference import ReferenceFile, log_softmax
from qwen3_export.text.samples import Samples
from tests.conftest import tiny_config, write_checkpoint

VOCAB = 320
Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors, dict[str, str]], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config()))


@pytest.fixture(scope="module")
def rows() -> Samples:
    random = np.random.default_rng(0)
    ids = tuple(random.integers(0, VOCAB, length).astype(np.int32) for length in (40, 17, 33, 16))
    return Samples(ids, ("code", "ünï", "code", "chat"))


@pytest.fixture(scope="module")
def live(checkpoint: Checkpoint, rows: Samples) -> LiveReference:
    return LiveReference(checkpoint, rows)


@pytest.fixture(scope="module")
def written(
    checkpoint: Checkpoint, rows: Samples, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[Path, dict[str, Any]]]:
    """`written(top_k)` → the file and what was reported about it."""
    folder, made = tmp_path_factory.mktemp("references"), {}

    def get(top_k: int) -> tuple[Path, dict[str, Any]]:
        if top_k not in made:
            path = folder / f"top{top_k}.safetensors"
            made[top_k] = path, write_reference(checkpoint, rows, path, top_k, force=False)
        return made[top_k]

    return get


def test_the_live_reference_says_what_a_plain_forward_pass_says(
    checkpoint: Checkpoint, rows: Samples, live: LiveReference
) -> None:
    decoder = Decoder(checkpoint)
    for row, ids in enumerate(rows.ids):
        logits = decoder.logits(decoder.hidden([ids])[0]).numpy()
        np.testing.assert_allclose(live.logits(row), logits, rtol=1e-5, atol=1e-5)
        truth = live.truth(row)
        np.testing.assert_allclose(truth.logprobs, log_softmax(logits[:-1]), atol=2e-5)
        wanted = [truth.logprobs[i, following] for i, following in enumerate(ids[1:])]
        np.testing.assert_array_equal(truth.next_logprob, wanted)


def test_the_continuations_are_the_originals_greedy_text(
    checkpoint: Checkpoint, rows: Samples, live: LiveReference
) -> None:
    decoder = Decoder(checkpoint)
    assert len(live.continuations.prompts) == 4
    for prompt, text in zip(live.continuations.prompts, live.continuations.tokens, strict=True):
        assert any(np.array_equal(prompt, ids[:32]) for ids in rows.ids)
        ids = prompt
        for token in text[:5]:
            following = int(decoder.logits(decoder.hidden([ids])[0][-1:]).argmax())
            assert token == following
            ids = np.append(ids, following)


@pytest.mark.parametrize("top_k", [0, 1, 16, VOCAB, VOCAB + 1])
def test_text_domains_and_continuations_are_read_back_exactly(
    checkpoint: Checkpoint, rows: Samples, live: LiveReference, written: Callable[..., Any], top_k: int
) -> None:
    path, report = written(top_k)
    file = ReferenceFile(path)
    assert file.samples.sha256 == rows.sha256
    assert file.samples.domains == rows.domains
    assert (file.vocab_size, file.source_sha256) == (VOCAB, checkpoint.sha256)
    assert file.is_lower_bound is (top_k >= VOCAB)
    np.testing.assert_array_equal(file.continuations.tokens, live.continuations.tokens)
    for found, wanted in zip(file.continuations.prompts, live.continuations.prompts, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert (report["bytes"], report["positions"]) == (path.stat().st_size, rows.tokens - 4)
    assert not list(path.parent.glob("*.partial"))


def test_all_logits_give_the_live_truths_exactly(live: LiveReference, written: Callable[..., Any]) -> None:
    file = ReferenceFile(written(0)[0])
    for row in range(4):
        found, wanted = file.truth(row), live.truth(row)
        assert found.ids is None
        np.testing.assert_array_equal(found.logprobs, wanted.logprobs)
        np.testing.assert_array_equal(found.next_logprob, wanted.next_logprob)


@pytest.mark.parametrize("top_k", [1, 16, VOCAB])
def test_the_top_k_are_the_most_likely_of_the_live_truth(
    live: LiveReference, written: Callable[..., Any], top_k: int
) -> None:
    file = ReferenceFile(written(top_k)[0])
    for row in range(4):
        found, wanted = file.truth(row), live.truth(row)
        order = np.argsort(-wanted.logprobs, axis=1, kind="stable")[:, :top_k]
        np.testing.assert_array_equal(found.logprobs, np.take_along_axis(wanted.logprobs, order, 1))
        np.testing.assert_array_equal(np.take_along_axis(wanted.logprobs, found.ids, 1), found.logprobs)
        np.testing.assert_array_equal(found.next_logprob, wanted.next_logprob)
        whole = np.exp(found.logprobs.astype(np.float64)).sum(1) + np.exp(found.tail.astype(np.float64))
        np.testing.assert_allclose(whole, 1, atol=1e-5)


def test_a_reference_file_is_not_replaced_without_force(
    checkpoint: Checkpoint, rows: Samples, written: Callable[..., Any]
) -> None:
    path, _ = written(1)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        write_reference(checkpoint, rows, path, 4, force=False)
    assert path.read_bytes() == before
    write_reference(checkpoint, rows, path, 1, force=True)
    assert path.read_bytes() == before


def put(name: str, value: Any) -> Edit:
    return lambda tensors, _: tensors.update({name: value(tensors[name]) if callable(value) else value})


def put_metadata(name: str, value: str) -> Edit:
    return lambda _, metadata: metadata.update({name: value})


EDITS: dict[str, Edit] = {
    "no vocabulary": lambda _, metadata: metadata.pop("vocab_size"),
    "vocabulary in words": put_metadata("vocab_size", "many"),
    "vocabulary too small": put_metadata("vocab_size", "100"),
    "vocabulary of nothing": put_metadata("vocab_size", "0"),
    "no top_k": lambda _, metadata: metadata.pop("top_k"),
    "another top_k": put_metadata("top_k", "17"),
    "negative top_k": put_metadata("top_k", "-1"),
    "all logits promised": put_metadata("top_k", "0"),
    "no domains": lambda _, metadata: metadata.pop("domains"),
    "domains no JSON": put_metadata("domains", "["),
    "domains a number": put_metadata("domains", "3"),
    "domains an object": put_metadata("domains", '{"a": "b"}'),
    "too few domains": put_metadata("domains", '["chat"]'),
    "no source": lambda _, metadata: metadata.pop("source_sha256"),
    "negative domain": put("row_domains", lambda a: a - 1),
    "a domain too few": put("row_domains", lambda a: a[1:]),
    "a token too few": put("tokens", lambda a: a[1:]),
    "tokens as numbers": put("tokens", lambda a: a.astype(np.float32)),
    "tokens in a square": put("tokens", lambda a: a[None]),
    "negative tokens": put("tokens", lambda a: -a),
    "tokens beyond the vocabulary": put("tokens", lambda a: a + VOCAB),
    "lengths that cancel": put("row_lengths", lambda a: a + np.array([50, -50, 0, 0], np.int32)),
    "a row of one token": put("row_lengths", lambda a: a + np.array([16, -16, 0, 0], np.int32)),
    "no rows": put("row_lengths", np.empty(0, np.int32)),
    "lengths in 64 bits": put("row_lengths", lambda a: a.astype(np.int64)),
    "prompts beyond the vocabulary": put("prompts", lambda a: a + VOCAB),
    "a prompt too few": put("prompt_lengths", lambda a: a[1:]),
    "continuations in a line": put("continuations", lambda a: a.reshape(-1)),
    "a continuation too few": put("continuations", lambda a: a[1:]),
    "no top tokens": lambda tensors, _: tensors.pop("top_ids"),
    "no tail": lambda tensors, _: tensors.pop("tail_logprob"),
    "a position too few": put("next_logprob", lambda a: a[1:]),
    "a position too many": put("top_logprobs", lambda a: np.concatenate([a, a[:1]])),
    "halves": put("top_logprobs", lambda a: a.astype(np.float16)),
    "tokens of another k": put("top_ids", lambda a: a[:, 1:]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_file_whose_parts_do_not_fit_is_refused_when_opened(
    tmp_path: Path, written: Callable[..., Any], edit: Edit
) -> None:
    source = TensorFile(written(16)[0])
    tensors, metadata = {name: source.read(name) for name in source.entries}, dict(source.metadata)
    write_tensors(tmp_path / "whole.safetensors", tensors.items(), metadata)
    assert ReferenceFile(tmp_path / "whole.safetensors").samples.tokens == 106
    edit(tensors, metadata)
    write_tensors(tmp_path / "broken.safetensors", tensors.items(), metadata)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: damaged reference file"):
        ReferenceFile(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("top_k", [0, 16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_refused_with_their_tensor(
    tmp_path: Path, written: Callable[..., Any], top_k: int, value: float
) -> None:
    source = TensorFile(written(top_k)[0])
    tensors = {name: source.read(name).copy() for name in source.entries}
    tensors["top_logprobs" if top_k else "logits"][50, 3] = value
    write_tensors(tmp_path / "broken.safetensors", tensors.items(), source.metadata)
    file = ReferenceFile(tmp_path / "broken.safetensors")
    assert np.isfinite(file.truth(0).logprobs).all()
    with pytest.raises(CheckpointError, match=r"tensor (top_logprobs|logits): it holds NaN"):
        file.truth(1)


@pytest.mark.parametrize("value", [-1, VOCAB])
def test_a_top_token_beyond_the_vocabulary_is_refused(tmp_path: Path, written: Callable[..., Any], value: int) -> None:
    source = TensorFile(written(16)[0])
    tensors = {name: source.read(name).copy() for name in source.entries}
    tensors["top_ids"][0, 0] = value
    write_tensors(tmp_path / "broken.safetensors", tensors.items(), source.metadata)
    with pytest.raises(CheckpointError, match="row 0 names a token beyond the vocabulary"):
        ReferenceFile(tmp_path / "broken.safetensors").truth(0)


def test_a_file_of_a_later_version_is_refused_as_such(tmp_path: Path) -> None:
    write_tensors(tmp_path / "later", [("x", np.ones(3, np.float32))], {"format": "qwen3-export reference 3"})
    with pytest.raises(CheckpointError, match="written by a later version"):
        ReferenceFile(tmp_path / "later")


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_another_kind_of_file_is_refused_with_a_hint(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_tensors(tmp_path / "other.safetensors", [("x", np.ones(3, np.float32))], metadata or {"a": "b"})
    with pytest.raises(CheckpointError, match="not a reference file of qwen3-export") as caught:
        ReferenceFile(tmp_path / "other.safetensors")
    assert caught.value.hint is not None


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_read_or_is_a_checkpoint_error(
    tmp_path: Path, written: Callable[..., Any], data: st.DataObject
) -> None:
    content = bytearray(written(16)[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header + 2000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, header]))])
    try:
        file = ReferenceFile(path)
        truths = [file.truth(row) for row in range(len(file.samples.ids))]
    except CheckpointError:
        return
    assert sum(len(truth.next_logprob) for truth in truths) == file.samples.tokens - len(file.samples.ids)
    assert json.loads(TensorFile(path).metadata["domains"])
