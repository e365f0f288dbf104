"""The original beside the quantized model on some of the calibration samples: which, what they are compared with, and
the same bytes whatever happens to the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import InputError, RecipeError
from qwen3_export.model.decoder import to_torch
from qwen3_export.solve.job import ORIGINAL, QUANTIZED, Job, QuantizeSettings
from qwen3_export.solve.methods import gptq
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import Samples, calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.conftest import copy_tokenizer, write_checkpoint
from tests.unit.processors import needs_avx2
from tests.unit.solve.support import CONFIGS, Interrupted, hashes, inputs_of_linears, spied
from tests.unit.solve.test_loop import recipe

# Of 19 rows every second is one of 9, the last but one of which is held out.
SAMPLES, LENGTH = 19, 48
BESIDE = {1: list(range(19)), 2: [1, 3, 5, 7, 9, 11, 13, 15, 17], 4: [3, 7, 11, 15]}
HELD_OUT = 15
Run = Callable[..., dict[str, str]]


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / request.param, CONFIGS[request.param])
    copy_tokenizer(reference_folder, folder)
    return folder


SETTINGS = QuantizeSettings(samples=SAMPLES, sequence_length=LENGTH, threads=2)
dense_only = pytest.mark.parametrize("source", ["dense"], indirect=True)


def shifted(every: int, **more: Any) -> Recipe:
    return recipe(target_shift=True, shift_every=every, **more)


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    """`run(name, recipe, setting=…)` quantizes and returns `{file name: sha256}` of the output."""

    def quantized(name: str, chosen: Recipe, progress: Any = None, **changes: Any) -> dict[str, str]:
        quantize(open_checkpoint(source), chosen, tmp_path / name, replace(SETTINGS, **changes), progress)
        return hashes(tmp_path / name)

    return quantized


def job_of(every: int, rows: int) -> Job:
    ids = Samples((np.zeros(LENGTH, np.int32),) * rows, ("a",) * rows)
    options = gptq.Options(target_shift=True, shift_every=every)
    return Job(None, None, gptq, options, ids, None, Path())  # type: ignore[arg-type]


@pytest.mark.parametrize("every", BESIDE)
def test_the_original_is_given_every_nth_row(every: int) -> None:
    job = job_of(every, SAMPLES)
    assert job.samples_of(ORIGINAL) == BESIDE[every]
    assert job.samples_of(QUANTIZED) == list(range(SAMPLES))
    assert job.models == (QUANTIZED, ORIGINAL)


def test_the_original_does_not_run_where_there_is_no_row_for_it() -> None:
    assert job_of(4, 3).models == (QUANTIZED,)
    assert job_of(4, 4).models == (QUANTIZED, ORIGINAL)


@pytest.mark.parametrize("every", [0, 3, 8])
def test_other_shares_of_the_rows_are_refused(every: int) -> None:
    with pytest.raises(RecipeError, match="shift_every"):
        gptq.Options(target_shift=True, shift_every=every)


def test_which_rows_run_beside_shows_in_every_block(run: Run) -> None:
    found = {name: run(name, chosen) for name, chosen in (("none", recipe()), ("1", shifted(1)), ("2", shifted(2)))}
    shards = [name for name in found["1"] if name.startswith("model-0000")]
    assert len(shards) == 3
    # The first shard holds what is never quantized; the others hold a block each.
    assert [found["1"][shard] == found["2"][shard] for shard in shards] == [True, False, False]
    assert [found["none"][shard] == found["2"][shard] for shard in shards] == [True, False, False]


@pytest.mark.parametrize("every", [2, 4])
def test_neither_threads_nor_a_stop_change_a_byte(source: Path, run: Run, tmp_path: Path, every: int) -> None:
    chosen = shifted(every, scale_search="solve", descent=1)
    wanted = run("wanted", chosen, threads=1)
    assert run("three", chosen, threads=3) == wanted
    with pytest.raises(KeyboardInterrupt):
        run("stopped", chosen, Interrupted(1))
    assert quantize(open_checkpoint(source), chosen, tmp_path / "stopped", SETTINGS)["resumed_blocks"] == 1
    assert hashes(tmp_path / "stopped") == wanted


def samples_of(source: Path) -> list[np.ndarray]:
    return list(calibration_samples(ModelTokenizer(source), load_documents("bundled"), SAMPLES, LENGTH, 0).ids)


def parts_of(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The tokens of some rows, in fp64."""
    return torch.cat([x[row * LENGTH : (row + 1) * LENGTH] for row in rows]).double()


def close(found: Any, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@dense_only
def test_each_row_is_compared_with_the_same_row_of_the_original(
    source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_products: None
) -> None:
    groups = spied(monkeypatch, lambda: run("out", shifted(2)))
    ours, theirs = (inputs_of_linears(folder, samples_of(source), monkeypatch) for folder in (tmp_path / "out", source))
    checkpoint = open_checkpoint(source)
    fitted = [row for row in BESIDE[2] if row != HELD_OUT]
    for name, group in groups.items():
        assert group.paired is not None
        close(group.hessian, (moment := ours[name].double()).T @ moment / len(moment))
        found = group.paired
        for part, rows in ((found.fitted, fitted), (found.held_out, [HELD_OUT]), (found.both, BESIDE[2])):
            x, original = parts_of(ours[name], rows), parts_of(theirs[name], rows)
            assert part.tokens == len(x)
            close(part.hessian, x.T @ x / len(x))
            if part.drift is not None:
                close(part.drift, (original - x).T @ x / len(x))
            elif name == f"{block_name(0)}.self_attn.o_proj":
                # Both residual streams are the embedding here.
                weight = to_torch(checkpoint.read(f"{name}.weight")).double()
                close(part.target, (original @ weight.T).T @ x / len(x))
        assert (found.both.target is not None) == name.endswith(("o_proj", "down_proj"))
        assert (found.both.drift is not None) != (found.both.target is not None)


@dense_only
@pytest.mark.parametrize(
    ("kind", "bounds"),
    [("bf16", (1e-4, 0.02, 0.3)), pytest.param("integers", (1e-6, 3e-4, 0.02), marks=needs_avx2)],
    ids=["bf16", "integers"],
)
def test_fast_products_leave_hessians_and_drifts_near_those_of_fp32(
    kind: str, bounds: tuple[float, ...], source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any processor: torch multiplies bf16 numbers everywhere, only slower. Some Hessian must have been made so."""
    farthest = 0.0
    monkeypatch.setattr("qwen3_export.model.workers.has_bf16", lambda: kind == "bf16")
    monkeypatch.setattr("qwen3_export.model.workers.has_fast_int_matmul", lambda: kind == "integers")
    groups = spied(monkeypatch, lambda: run("out", shifted(2)))
    monkeypatch.undo()
    ours, theirs = (inputs_of_linears(folder, samples_of(source), monkeypatch) for folder in (tmp_path / "out", source))
    for name, group in groups.items():
        x = ours[name].double()
        wanted = x.T @ x / len(x)
        assert group.hessian is not None
        farthest = max(farthest, float((group.hessian - wanted).norm() / wanted.norm()))
        assert group.paired is not None
        if group.paired.both.drift is not None:
            x, original = (parts_of(inputs[name], BESIDE[2]) for inputs in (ours, theirs))
            drift = (original - x).T @ x / len(x)
            if float(drift.norm() / wanted.norm()) > 0.02:
                assert float((group.paired.both.drift - drift).norm() / drift.norm()) < bounds[2]
    assert bounds[0] < farthest < bounds[1]


@dense_only
def test_a_run_does_not_go_on_where_its_rows_would_be_rounded_in_another_way(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_processor(has_bf16: bool) -> None:
        monkeypatch.setattr("qwen3_export.model.workers.has_bf16", lambda: has_bf16)

    on_a_processor(has_bf16=True)
    wanted = run("wanted", shifted(2))
    with pytest.raises(KeyboardInterrupt):
        run("out", shifted(2), Interrupted(1))
    on_a_processor(has_bf16=False)
    with pytest.raises(InputError, match="unfinished run with another kind of processor"):
        run("out", shifted(2))
    on_a_processor(has_bf16=True)
    assert run("out", shifted(2)) == wanted
