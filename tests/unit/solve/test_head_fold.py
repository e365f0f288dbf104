"""Scales that move between the final norm and an untied head: the same function, rounded with a smaller error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.qwen3 import FINAL_NORM, HEAD
from qwen3_export.core.scheme import scheme_of_type
from qwen3_export.model.decoder import Decoder
from qwen3_export.solve.blocks.fold import input_noise
from qwen3_export.solve.quantize import quantize
from tests.conftest import copy_tokenizer, random_tensors, tiny_config, write_checkpoint
from tests.unit.solve.support import Interrupted, hashes, spied
from tests.unit.solve.test_embeddings import BOTH, SETTINGS, W4, calibration, close, recipe, second_moment

BF16 = np.dtype(ml_dtypes.bfloat16)
# Of the final norm's channels every ninth is so many times larger, and the head's columns smaller.
OUTLIER = 64.0


@pytest.fixture
def source(tmp_path: Path, reference_folder: Path) -> Checkpoint:
    """An untied model whose head has outlier channels among its inputs."""
    config = tiny_config(vocab_size=8192, tie_word_embeddings=False)
    folder = write_checkpoint(tmp_path / "source", config)
    checkpoint = open_checkpoint(folder)
    tensors = random_tensors(checkpoint.config)
    large = np.ones(64, np.float32)
    large[::9] = OUTLIER
    for name, factor in ((FINAL_NORM, large), (f"{HEAD}.weight", 1 / large)):
        tensors[name] = (tensors[name].astype(np.float32) * factor).astype(BF16)
    return open_checkpoint(copy_tokenizer(reference_folder, write_checkpoint(folder, config, tensors)))


def logit_error(checkpoint: Checkpoint, source: Checkpoint) -> float:
    """Of the head alone: relative to the logits of the source's head on the same hidden states."""
    rows = calibration(source.folder)
    x = torch.cat(Decoder(checkpoint).hidden(rows))
    norms = [torch.from_numpy(c.read(FINAL_NORM).astype(np.float32)) for c in (source, checkpoint)]
    wanted = Decoder(source).logits(x * norms[0] / norms[1])
    return float((Decoder(checkpoint).logits(x) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("shifted", [False, True])
def test_the_folded_head_is_solved_for_the_inputs_that_it_gets(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_products: None, shifted: bool
) -> None:
    chosen = recipe(*BOTH, fold="awq", target_shift=shifted)
    groups = spied(monkeypatch, lambda: quantize(source, chosen, tmp_path / "out", SETTINGS))
    made = open_checkpoint(tmp_path / "out")
    before, after = (c.read(FINAL_NORM).astype(np.float32) for c in (source, made))
    ratio = before / after
    assert ratio[::9].min() > 2 * np.delete(ratio, np.s_[::9]).max()
    weight = groups[HEAD].weights[HEAD].numpy()
    np.testing.assert_array_equal(weight, source.read(f"{HEAD}.weight").astype(np.float32) * ratio)
    close(groups[HEAD].hessian, second_moment(Decoder(made).hidden(calibration(source.folder))))


def test_a_fold_before_the_head_halves_its_error(source: Checkpoint, tmp_path: Path) -> None:
    for name, options in {"plain": {}, "folded": {"fold": "awq"}}.items():
        quantize(source, recipe(*BOTH, **options), tmp_path / name, SETTINGS)
    plain, folded = (open_checkpoint(tmp_path / name) for name in ("plain", "folded"))
    assert plain.read(FINAL_NORM).tobytes() == source.read(FINAL_NORM).tobytes()
    assert logit_error(folded, source) < 0.5 * logit_error(plain, source)


def test_the_norm_before_a_head_in_16_bits_stays(source: Checkpoint, tmp_path: Path) -> None:
    quantize(source, recipe(fold="awq"), tmp_path / "out", SETTINGS)
    assert open_checkpoint(tmp_path / "out").read(FINAL_NORM).tobytes() == source.read(FINAL_NORM).tobytes()


def test_even_inputs_are_left_alone(make_checkpoint: Callable, reference_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=8192, tie_word_embeddings=False)
    even = open_checkpoint(copy_tokenizer(reference_folder, make_checkpoint(config)))
    quantize(even, recipe((HEAD, W4), fold="awq"), tmp_path / "out", SETTINGS)
    assert open_checkpoint(tmp_path / "out").read(FINAL_NORM).tobytes() == even.read(FINAL_NORM).tobytes()


def test_a_stop_before_the_head_changes_no_byte(source: Checkpoint, tmp_path: Path) -> None:
    chosen = recipe(*BOTH, fold="awq", target_shift=True)
    quantize(source, chosen, tmp_path / "wanted", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, chosen, tmp_path / "stopped", replace(SETTINGS, threads=2), Interrupted(2))
    quantize(source, chosen, tmp_path / "stopped", replace(SETTINGS, threads=2))
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "wanted")


@pytest.mark.parametrize(("scheme", "width", "length"), [("q4_k", 512, 256), ("q8_0", 512, 32), ("q8_0", 96, 32)])
def test_the_error_of_rounded_inputs_is_what_rounding_them_causes(scheme: str, width: int, length: int) -> None:
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, width, generator=random), torch.randn(400, width, generator=random)
    x[:, ::9] *= 8
    blocks = x.reshape(len(x), -1, length)
    steps = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = ((blocks / steps).round() * steps).reshape(x.shape)
    wanted = ((rounded - x) @ weight.T).square().sum(-1).mean()
    assert input_noise(weight, x, scheme_of_type(scheme)) == pytest.approx(float(wanted), rel=0.05)
