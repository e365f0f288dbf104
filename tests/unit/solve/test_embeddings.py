"""Embedding and head that a recipe names: what they are solved against, what block 0 then sees, and the same bytes
whatever happens to the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.manifest import read_manifest
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import CheckpointError, RecipeError
from qwen3_export.model.decoder import Decoder, load_block
from qwen3_export.model.table import Table
from qwen3_export.solve import chunk_sizes as cuts
from qwen3_export.solve.blocks import embeddings as head
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.preflight import artifact_bytes, memory_needed
from qwen3_export.solve.quantize import quantize
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer
from tests.conftest import copy_tokenizer, random_tensors, tiny_config, write_checkpoint
from tests.unit.solve.support import Interrupted, hashes, spied
from tests.unit.solve.test_loop import ALL_RUNGS, LENGTH, SAMPLES

W4, W8 = {"num_bits": 4, "group_size": 16}, {"num_bits": 8, "group_size": 32}
BOTH = ((EMBEDDING, W8), (HEAD, W4))
TIES = {"tied": True, "untied": False}


def recipe(*outer: tuple[str, Any], method: str = "gptq", layout: str = "compressed-tensors", **options: Any) -> Recipe:
    rules = [{"match": match, "scheme": scheme} for match, scheme in (*outer, ("*", W4))]
    values = {"name": "test", "method": method, "rules": rules, "options": options, "layout": layout}
    return Recipe.from_dict(values, "test")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> dict[bool, Path]:
    """Tiny models by whether their head is tied."""
    made = {}
    for name, tied in TIES.items():
        config = tiny_config(vocab_size=8192, tie_word_embeddings=tied)
        folder = write_checkpoint(tmp_path_factory.mktemp("source") / name, config)
        made[tied] = copy_tokenizer(reference_folder, folder)
    return made


SETTINGS = QuantizeSettings(samples=SAMPLES, sequence_length=LENGTH, threads=1)


def outer_rules(tied: bool) -> tuple[tuple[str, Any], ...]:
    return ((EMBEDDING, W8), (HEAD, W8)) if tied else BOTH


def calibration(source: Path) -> list[np.ndarray]:
    rows = calibration_samples(ModelTokenizer(source), load_documents("bundled"), SAMPLES, LENGTH, 0)
    return list(rows.ids)


def codes(checkpoint: Checkpoint, module: str) -> QuantizedTensor:
    tensor = checkpoint.linear(module)
    assert isinstance(tensor, QuantizedTensor)
    return tensor


def second_moment(rows: list[torch.Tensor]) -> np.ndarray:
    x = torch.cat(rows).double()
    return (x.T @ x / len(x)).numpy()


def close(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max()))


def test_an_untied_head_is_solved_against_what_the_quantized_model_hands_it(
    sources: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_products: None
) -> None:
    source = open_checkpoint(sources[False])
    groups = spied(monkeypatch, lambda: quantize(source, recipe(*BOTH), tmp_path / "out", SETTINGS))
    assert EMBEDDING not in groups, "an embedding is rounded"
    made, rows = open_checkpoint(tmp_path / "out"), calibration(sources[False])
    decoder = Decoder(made)
    close(groups[HEAD].hessian, second_moment(decoder.hidden(rows)))
    block, table = load_block(made, 0), Table(codes(made, EMBEDDING))
    first = [block.initial_state(table.rows(ids)[None])["x"][0] for ids in rows]
    close(groups["model.layers.0.self_attn.q_proj"].hessian, second_moment(first))
    plain = [block.initial_state(Table(source.read(f"{EMBEDDING}.weight")).rows(ids)[None])["x"][0] for ids in rows]
    assert not np.allclose(second_moment(plain), second_moment(first), rtol=1e-4)


def test_a_shifted_head_aims_at_the_original(
    sources: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_products: None
) -> None:
    source, rows = open_checkpoint(sources[False]), calibration(sources[False])
    chosen = recipe(*BOTH, target_shift=True)
    groups = spied(monkeypatch, lambda: quantize(source, chosen, tmp_path / "out", SETTINGS))
    ours, theirs = (Decoder(c).hidden(rows) for c in (open_checkpoint(tmp_path / "out"), source))
    paired = groups[HEAD].paired
    assert paired is not None
    held_out = [i for i in range(SAMPLES) if i % 8 == 7]
    fitted = [i for i in range(SAMPLES) if i not in held_out]
    parts = ((paired.fitted, fitted), (paired.held_out, held_out), (paired.both, range(SAMPLES)))
    for found, chosen_rows in parts:
        x, original = (torch.cat([part[i] for i in chosen_rows]).double() for part in (ours, theirs))
        assert found.tokens == len(x)
        close(found.drift, ((original - x).T @ x / len(x)).numpy())
        close(found.hessian, (x.T @ x / len(x)).numpy())


def test_a_tied_matrix_is_solved_for_both_of_its_uses(
    sources: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, rows = open_checkpoint(sources[True]), calibration(sources[True])[:: head.AHEAD_EVERY]
    groups = spied(monkeypatch, lambda: quantize(source, recipe((EMBEDDING, W4)), tmp_path / "out", SETTINGS))
    moment = second_moment(Decoder(source).hidden(rows))
    close(groups[EMBEDDING].hessian, (moment / moment.diagonal().mean() + np.eye(len(moment))) / 2)
    made = open_checkpoint(tmp_path / "out")
    assert HEAD not in made.schemes
    assert not any(name.startswith(HEAD) for name in made.files)
    logits = Decoder(made).logits(torch.eye(64)).numpy()
    np.testing.assert_allclose(logits.T, dequantize(codes(made, EMBEDDING)), rtol=1e-6)


@pytest.mark.parametrize("tied", TIES.values(), ids=TIES)
def test_looked_up_rows_are_solved_for_what_their_errors_cost(
    sources: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Where a pass back through the original measured it: G is compared with autograd's in test_noise_shaping."""
    source = open_checkpoint(sources[tied])
    chosen = recipe((EMBEDDING, W4), output_rows=4)
    read: dict[str, Any] = {}

    def run() -> None:
        monkeypatch.setattr(head, "_of_rows", spy_rows)
        quantize(source, chosen, tmp_path / "out", SETTINGS)

    rows_of = head._of_rows

    def spy_rows(found: Any, device: str) -> torch.Tensor:
        read.update(rows=found.of_rows().double(), share=found.head_share(), tokens=found.tokens())
        return rows_of(found, device)

    group = spied(monkeypatch, run)[EMBEDDING]
    even = np.eye(64) * float(read["rows"].diagonal().mean())
    wanted = 0.9 * read["rows"].numpy() + 0.1 * even
    if tied:
        wanted = wanted + read["share"] * second_moment(Decoder(source).hidden(calibration(sources[tied])[::4]))
    else:
        assert group.tokens == read["tokens"] == 4 * LENGTH
    close(group.hessian, wanted)
    assert read_manifest(tmp_path / "out")["tensors"][EMBEDDING]["method"] == "gptq"


def test_an_embedding_is_rounded_to_the_nearest_of_its_grid(sources: dict[bool, Path], tmp_path: Path) -> None:
    quantize(open_checkpoint(sources[False]), recipe((EMBEDDING, W4)), tmp_path / "out", SETTINGS)
    weight = open_checkpoint(sources[False]).read(f"{EMBEDDING}.weight").astype(np.float64)
    tensor = codes(open_checkpoint(tmp_path / "out"), EMBEDDING)
    scales = np.repeat(tensor.scales.astype(np.float64), 16, 1)
    wanted = np.clip(np.rint(weight / scales) + 8, 0, 15)
    assert (tensor.codes == wanted).mean() > 0.9999, "ties apart"
    entry = read_manifest(tmp_path / "out")["tensors"][EMBEDDING]
    error = ((dequantize(tensor) - weight) ** 2).sum() / (weight**2).sum()
    assert (entry["method"], entry["error"]) == ("rtn", pytest.approx(error, rel=1e-4))


@pytest.mark.parametrize("tied", TIES.values(), ids=TIES)
def test_the_pieces_of_rows_do_not_show(
    sources: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    source, chosen = open_checkpoint(sources[tied]), recipe(*outer_rules(tied))
    quantize(source, chosen, tmp_path / "whole", SETTINGS)
    assert cuts.out_rows_at_once(64) > 8192 > 1024
    monkeypatch.setattr(cuts, "PIECE_WEIGHTS", 1536 * 64)
    quantize(source, chosen, tmp_path / "cut", SETTINGS)
    whole, cut = (open_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    for module in source.config.outer_matrices():
        a, b = codes(whole, module), codes(cut, module)
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.scales, b.scales)
        errors = [read_manifest(tmp_path / name)["tensors"][module]["error"] for name in ("whole", "cut")]
        assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("tied", TIES.values(), ids=TIES)
def test_neither_threads_nor_a_stop_change_a_byte(sources: dict[bool, Path], tmp_path: Path, tied: bool) -> None:
    source, chosen = open_checkpoint(sources[tied]), recipe(*outer_rules(tied), **ALL_RUNGS)
    quantize(source, chosen, tmp_path / "wanted", SETTINGS)
    wanted = hashes(tmp_path / "wanted")
    assert len([name for name in wanted if name.endswith(".safetensors")]) == (3 if tied else 4)
    # Ticks: two blocks of the original that runs ahead of a tied matrix, two blocks, the head.
    for stop in range(1, 5 if tied else 4):
        output = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            quantize(source, chosen, output, replace(SETTINGS, threads=2), Interrupted(stop))
        assert not output.exists()
        quantize(source, chosen, output, replace(SETTINGS, threads=2))
        assert hashes(output) == wanted


@pytest.mark.parametrize("tied", TIES.values(), ids=TIES)
def test_the_manifest_and_the_sizes_count_them(sources: dict[bool, Path], tmp_path: Path, tied: bool) -> None:
    source, chosen = open_checkpoint(sources[tied]), recipe(*outer_rules(tied), method="rtn")
    result = quantize(source, chosen, tmp_path / "out", SETTINGS)
    manifest, made = read_manifest(tmp_path / "out"), open_checkpoint(tmp_path / "out")
    assert manifest["policy"]["embedding"] == "w8-g32-sym"
    assert manifest["policy"]["lm_head"] == ("tied to the embedding" if tied else "w4-g16-sym")
    layers = [layer["name"] for layer in result["layers"]]
    assert layers[0] == EMBEDDING
    assert (layers[-1] == HEAD) is not tied
    assert result["tensors"] == len(layers) == 14 + (1 if tied else 2) == len(made.schemes)
    assert result["bits_per_weight"] < 9
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert artifact_bytes(source, chosen) == pytest.approx(written, rel=0.1)
    assert memory_needed(source.config, None, outer=True) >= memory_needed(source.config, None)


def test_the_estimate_of_memory_grows_with_the_vocabulary_by_bytes_not_by_floats() -> None:
    from qwen3_export.core.qwen3 import parse_config

    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    small, large = (parse_config(tiny_config(**sizes, vocab_size=n), "test") for n in (150_000, 300_000))
    difference = memory_needed(large, None, outer=True) - memory_needed(small, None, outer=True)
    assert 0 < difference < 4 * 150_000 * 1024


@pytest.mark.parametrize("tied", TIES.values(), ids=TIES)
def test_no_wildcard_reaches_them(sources: dict[bool, Path], tmp_path: Path, tied: bool) -> None:
    quantize(open_checkpoint(sources[tied]), recipe(method="rtn"), tmp_path / "out", SETTINGS)
    source, made = open_checkpoint(sources[tied]), open_checkpoint(tmp_path / "out")
    for module in source.config.outer_matrices():
        assert made.read(f"{module}.weight").tobytes() == source.read(f"{module}.weight").tobytes()
    assert made.raw_config["quantization_config"]["ignore"] == ["lm_head"]


def test_codes_survive_the_folder_and_its_manifest_being_lost(sources: dict[bool, Path], tmp_path: Path) -> None:
    """Without our manifest the folder is read as another tool's, from its quantization_config alone."""
    for tied, layout in ((True, "compressed-tensors"), (False, "compressed-tensors"), (False, "gptq")):
        rules = ((HEAD, W4),) if layout == "gptq" else outer_rules(tied)
        folder = tmp_path / f"{layout}-{tied}"
        quantize(open_checkpoint(sources[tied]), recipe(*rules, method="rtn", layout=layout), folder, SETTINGS)
        ours = open_checkpoint(folder)
        (folder / "qwen3-export.json").unlink()
        theirs = open_checkpoint(folder)
        assert {m: s.label for m, s in theirs.schemes.items()} == {m: s.label for m, s in ours.schemes.items()}
        for module in {EMBEDDING, HEAD} & set(ours.schemes):
            np.testing.assert_array_equal(codes(theirs, module).codes, codes(ours, module).codes)
            np.testing.assert_array_equal(codes(theirs, module).scales32, codes(ours, module).scales32)


@pytest.mark.parametrize(
    ("layout", "rules", "message"),
    [
        ("awq", ((HEAD, W4),), "the awq layout has no place for a quantized lm_head"),
        ("gptq", ((EMBEDDING, W4),), "the gptq layout has no place for a quantized model.embed_tokens"),
        ("gptq", ((HEAD, W8),), "one scheme for all linears"),
        ("compressed-tensors", ((HEAD, {"num_bits": 8, "strategy": "tensor"}),), "none may share a scale"),
        ("compressed-tensors", ((EMBEDDING, {**W8, "activations": "dynamic-token"}),), "token ids"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_before_the_work(
    sources: dict[bool, Path], tmp_path: Path, layout: str, rules: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(open_checkpoint(sources[False]), recipe(*rules, layout=layout), tmp_path / "out", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_stored_head_beside_a_tied_quantized_embedding_is_refused(sources: dict[bool, Path], tmp_path: Path) -> None:
    from qwen3_export.core.tensorfile import write_tensors

    quantize(open_checkpoint(sources[True]), recipe((EMBEDDING, W8), method="rtn"), tmp_path / "out", SETTINGS)
    made = open_checkpoint(tmp_path / "out")
    tensors = {name: made.read(name) for name in made.files}
    for shard in (tmp_path / "out").glob("*.safetensors*"):
        shard.unlink()
    head_weight = random_tensors(made.config)[f"{EMBEDDING}.weight"]
    write_tensors(tmp_path / "out" / "model.safetensors", {**tensors, f"{HEAD}.weight": head_weight}.items())
    with pytest.raises(CheckpointError, match="stored beside a quantized embedding"):
        open_checkpoint(tmp_path / "out")


def test_a_table_gives_the_same_rows_whether_expanded_or_not(sources: dict[bool, Path], tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "strategy": "channel", "activations": "dynamic-token"}
    quantize(open_checkpoint(sources[False]), recipe((HEAD, scheme), method="rtn"), tmp_path / "out", SETTINGS)
    tensor = codes(open_checkpoint(tmp_path / "out"), HEAD)
    wanted, ids, x = dequantize(tensor), np.array([[5, 8191], [0, 5]]), torch.randn(3, 64)
    for table in (Table(tensor), Table(tensor, expand=True)):
        np.testing.assert_array_equal(table.rows(ids), wanted[ids])
        np.testing.assert_array_equal(table.rows(slice(7, 19)), wanted[7:19])
        plain = x @ torch.from_numpy(wanted).T
        assert 1e-4 < float((table.logits(x) - plain).abs().max()) < 0.1, "inputs are rounded to int8"
