"""The block loop: what each linear was solved against, and that nothing but the input decides the bytes.

The Hessians are compared with X^T X / n over the inputs that a plain forward pass of the finished
quantized model sends through each linear: a linear's inputs depend only on what was solved before it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import CheckpointError, InputError
from qwen3_export.model.workers import workers
from qwen3_export.solve import chunk_sizes
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.conftest import copy_tokenizer, write_checkpoint
from tests.unit.solve.support import (
    CONFIGS,
    Interrupted,
    hashes,
    inputs_of_linears,
    spied,
    write_calibration_text,
)

# Every rung of the solver beyond the paper.
ALL_RUNGS = {"scale_search": "solve", "descent": 2, "target_shift": True}
SAMPLES, LENGTH = 11, 48


def recipe(method: str = "gptq", **options: Any) -> Recipe:
    scheme = {"num_bits": 4, "group_size": 16}
    rules = [{"match": "*.1.*.v_proj", "scheme": None}, {"match": "*", "scheme": scheme}]
    # What stands in for the inputs of experts that saw too few is tested in experts/test_floor.py.
    values = {"name": "test", "method": method, "rules": rules, "options": options, "experts": {"min_tokens": 0}}
    return Recipe.from_dict(values, "test")


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Path:
    """A tiny model with a tokenizer and a calibration text."""
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / request.param, CONFIGS[request.param])
    copy_tokenizer(reference_folder, folder)
    write_calibration_text(folder.parent / "calibration.txt")
    return folder


@pytest.fixture(scope="module")
def settings(source: Path) -> QuantizeSettings:
    return QuantizeSettings(str(source.parent / "calibration.txt"), SAMPLES, LENGTH, threads=2)


@pytest.fixture(scope="module", params=[{}, ALL_RUNGS], ids=["paper", "all-rungs"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(scope="module")
def wanted(source: Path, settings: QuantizeSettings, options: dict[str, Any]) -> dict[str, str]:
    """`{file name: sha256}` of a run that was never stopped, on two threads."""
    output = source.parent / f"wanted-{len(options)}"
    if not output.exists():
        quantize(open_checkpoint(source), recipe(**options), output, settings)
    return hashes(output)


@pytest.fixture
def run(source: Path, tmp_path: Path, settings: QuantizeSettings) -> Callable[..., dict[str, str]]:
    """`run(name, recipe, setting=…)` quantizes and returns `{file name: sha256}` of the output."""

    def quantized(name: str, chosen: Recipe, progress: Progress | None = None, **changes: Any) -> dict[str, str]:
        quantize(open_checkpoint(source), chosen, tmp_path / name, replace(settings, **changes), progress)
        return hashes(tmp_path / name)

    return quantized


def test_every_linear_is_solved_against_the_inputs_it_will_get(
    source: Path,
    tmp_path: Path,
    settings: QuantizeSettings,
    run: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    exact_products: None,
) -> None:
    # 11 samples in pieces of 4: the last piece is a short one.
    monkeypatch.setattr(chunk_sizes, "TOKENS_AT_ONCE", 4 * LENGTH + 1)
    groups = spied(monkeypatch, lambda: run("out", recipe()))
    monkeypatch.undo()

    documents = load_documents(settings.calibration)
    rows = calibration_samples(ModelTokenizer(source), documents, SAMPLES, LENGTH, settings.seed)
    inputs = inputs_of_linears(tmp_path / "out", list(rows.ids), monkeypatch)
    checkpoint, manifest = open_checkpoint(tmp_path / "out"), read_manifest(tmp_path / "out")
    assert set(groups) == set(checkpoint.schemes)
    assert f"{block_name(1)}.self_attn.v_proj" not in groups
    for name, group in groups.items():
        x = inputs.get(name, torch.empty(0, group.weights[name].shape[1])).double()
        wanted = x.T @ x / max(len(x), 1)
        assert group.tokens == len(x) == manifest["tensors"][name]["tokens"]
        assert group.hessian is not None
        np.testing.assert_allclose(group.hessian, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert_error_is(manifest["tensors"][name]["error"], source, tmp_path / "out", name, wanted.numpy())


@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_static_input_scale_is_the_largest_input_that_calibration_saw(
    source: Path,
    tmp_path: Path,
    settings: QuantizeSettings,
    run: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """In the quantized model itself, whose inputs are rounded by the scales of the layers before."""
    scheme = {"num_bits": 8, "type": kind, "strategy": "channel", "activations": "static-tensor"}
    values = {"name": "test", "method": "rtn", "rules": [{"match": "*", "scheme": scheme}]}
    run("out", Recipe.from_dict({**values, "experts": {"min_tokens": 0}}, "test"))
    rows = calibration_samples(ModelTokenizer(source), load_documents(settings.calibration), SAMPLES, LENGTH, 0)
    inputs, checkpoint = (
        inputs_of_linears(tmp_path / "out", list(rows.ids), monkeypatch),
        open_checkpoint(tmp_path / "out"),
    )
    checked = 0
    for name in checkpoint.schemes:
        tensor = checkpoint.linear(name)
        assert isinstance(tensor, QuantizedTensor)
        if name in inputs:
            wanted = float(inputs[name].abs().max()) / (448 if kind == "float" else 127.5)
            assert tensor.input_scale == pytest.approx(wanted, rel=2.0**-8)
            checked += 1
    assert checked >= len(checkpoint.schemes) - 3


def assert_error_is(reported: float, source: Path, folder: Path, name: str, hessian: np.ndarray) -> None:
    """tr(D H D^T) / tr(W H W^T) of what is on the disk."""
    weight = open_checkpoint(source).read(f"{name}.weight").astype(np.float64)
    tensor = open_checkpoint(folder).linear(name)
    assert isinstance(tensor, QuantizedTensor)
    delta = dequantize(tensor) - weight
    error, total = (float(np.trace(m @ hessian @ m.T)) for m in (delta, weight))
    assert reported == pytest.approx(error / total if total else 0, rel=1e-3, abs=1e-9)


def test_expert_tokens_are_counted_for_every_expert(run: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    run("out", recipe())
    manifest, config = read_manifest(tmp_path / "out"), open_checkpoint(tmp_path / "out").config
    if not config.sparse_layers:
        assert manifest["experts"] is None
        return
    counts = []
    for layer in config.sparse_layers:
        prefix = f"{block_name(layer)}.mlp.experts."
        for part in ("gate_proj", "up_proj", "down_proj"):
            found = [manifest["tensors"][f"{prefix}{e}.{part}"]["tokens"] for e in range(config.num_experts)]
            assert sum(found) == SAMPLES * LENGTH * config.experts_per_token
            counts += found
    assert manifest["experts"]["min_tokens"] == min(counts)
    assert manifest["experts"]["below_floor"] == 0


def test_neither_threads_nor_memory_change_a_byte(
    run: Callable[..., dict[str, str]], options: dict[str, Any], wanted: dict[str, str]
) -> None:
    assert {"config.json", "qwen3-export.json", "model-00003-of-00003.safetensors", "tokenizer.json"} < set(wanted)
    assert run("one", recipe(**options), threads=1) == wanted
    assert run("three", recipe(**options), threads=3, memory=64 << 30) == wanted


def test_rounding_does_not_depend_on_threads_or_text(run: Callable[..., dict[str, str]]) -> None:
    rounded = run("two", recipe("rtn"))
    assert run("three", recipe("rtn"), threads=3, calibration="hf:no/such-dataset") == rounded


@pytest.mark.parametrize(
    ("changes", "other"),
    [({"seed": 1}, {}), ({"samples": SAMPLES - 1}, {}), ({}, {"act_order": False}), ({}, {"scale_search": "absmax"})],
    ids=["seed", "text", "order", "search"],
)
@pytest.mark.parametrize("options", [{}], ids=["paper"], indirect=True)
def test_what_should_change_the_bytes_changes_those_of_every_block(
    run: Callable[..., dict[str, str]], wanted: dict[str, str], changes: dict[str, Any], other: dict[str, Any]
) -> None:
    found = run("other", recipe(**other), **changes)
    shards = [name for name in wanted if name.startswith("model-0000")]
    # The first shard holds what is never quantized; the others hold a block each.
    assert [found[shard] == wanted[shard] for shard in shards] == [True, False, False]


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, settings: QuantizeSettings, options: dict[str, Any], wanted: dict[str, str]
) -> None:
    checkpoint, output = open_checkpoint(source), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, recipe(**options), output, settings, Interrupted(1))
    assert not output.exists()
    with pytest.raises(InputError, match=r"unfinished run with another (seed|calibration)"):
        quantize(checkpoint, recipe(**options), output, replace(settings, seed=5))
    with pytest.raises(InputError, match="unfinished run with another recipe"):
        quantize(checkpoint, recipe(percdamp=0.5), output, settings)
    assert quantize(checkpoint, recipe(**options), output, settings)["resumed_blocks"] == 1
    assert hashes(output) == wanted


@pytest.mark.parametrize("options", [{}], ids=["paper"], indirect=True)
def test_a_stopped_run_can_be_started_over(run: Callable[..., dict[str, str]], wanted: dict[str, str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("stopped", recipe(percdamp=0.5), Interrupted(1))
    assert run("stopped", recipe(), resume=False) == wanted


def test_a_damaged_weight_stops_the_run_with_its_name(source: Path, tmp_path: Path, settings: QuantizeSettings) -> None:
    from qwen3_export.core.tensorfile import write_tensors

    folder, name = shutil.copytree(source, tmp_path / "damaged"), "model.layers.1.self_attn.o_proj"
    checkpoint = open_checkpoint(source)
    tensors = {tensor: checkpoint.read(tensor).copy() for tensor in checkpoint.files}
    tensors[f"{name}.weight"][3, 3] = np.nan
    write_tensors(folder / "model.safetensors", tensors.items())
    with pytest.raises(CheckpointError, match=rf"{name}\.weight: .* NaN"):
        quantize(open_checkpoint(folder), recipe(), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_run_that_needs_more_memory_than_allowed_stops_before_it_starts(
    source: Path, tmp_path: Path, settings: QuantizeSettings
) -> None:
    with pytest.raises(InputError, match="--memory allows"):
        quantize(open_checkpoint(source), recipe(), tmp_path / "out", replace(settings, memory=1 << 20))
    assert not list(tmp_path.glob("out*"))


def test_a_quantized_folder_is_not_quantized_again(
    tmp_path: Path, settings: QuantizeSettings, run: Callable[..., dict[str, str]]
) -> None:
    run("once", recipe("rtn"))
    with pytest.raises(InputError, match="quantized already"):
        quantize(open_checkpoint(tmp_path / "once"), recipe("rtn"), tmp_path / "twice", settings)


def test_results_come_in_the_order_of_the_items_on_one_torch_thread_each() -> None:
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.002 * (10 - item))
        return item, torch.get_num_threads()

    before = torch.get_num_threads()
    with workers(3) as pool:
        assert pool.map(work, range(10)) == [(item, 1) for item in range(10)]
    assert torch.get_num_threads() == before


def test_when_one_item_fails_nothing_runs_on_behind_the_callers_back() -> None:
    running, finished = threading.Event(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            running.wait(5)
            raise ValueError("the first one")
        running.set()
        time.sleep(0.2)
        finished.set()

    with workers(2) as pool:
        with pytest.raises(ValueError, match="the first one"):
            pool.map(work, range(50))
        assert finished.is_set()
