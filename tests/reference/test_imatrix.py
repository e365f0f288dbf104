"""Importance matrices: ours hold what transformers' linears see, llama.cpp reads and uses them, and theirs are ours."""

from __future__ import annotations

import ctypes as C
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.imatrix import Imatrix, ImatrixEntry, read_imatrix
from qwen3_export.core.progress import Progress
from qwen3_export.core.recipe import Recipe
from qwen3_export.errors import InputError
from qwen3_export.ship.gguf import Options, export_gguf
from qwen3_export.solve.importance import calibrate
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import calibration_of
from tests.artifact.support import gguf_tensors, tiny_with_tokenizer
from tests.conftest import tiny_moe_config
from tests.reference import ggml, llama_quantize
from tests.reference.models import load_theirs

SETTINGS = QuantizeSettings(samples=6, sequence_length=48, threads=1)
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def matrix(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    calibrate(open_checkpoint(reference_folder), path, SETTINGS)
    return path


def samples_of(folder: Path) -> list[NDArray]:
    return list(calibration_of(open_checkpoint(folder), Recipe("calibrate", "rtn", ()), SETTINGS, Progress()).ids)


def test_sums_are_those_of_transformers_linears(reference_folder: Path, matrix: Path) -> None:
    model, sums = load_theirs(reference_folder), dict[str, torch.Tensor]()

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].double().square().reshape(-1, inputs[0].shape[-1]).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return hook

    for name, module in model.named_modules():
        local = name.rpartition(".")[2]
        if local in NAMES:
            module.register_forward_pre_hook(watch(f"blk.{name.split('.')[2]}.{NAMES[local]}.weight"))
    with torch.no_grad():
        for ids in samples_of(reference_folder):
            model(torch.from_numpy(ids.astype(np.int64))[None])
    found = read_imatrix(matrix)
    assert found.entries.keys() == sums.keys()
    assert (found.chunks, found.chunk_size, list(found.datasets)) == (6, 48, ["bundled"])
    for name, entry in found.entries.items():
        assert entry.counts.tolist() == [6 * 48]
        wanted = sums[name].numpy()
        assert np.abs(entry.sums[0] - wanted).sum() < 0.01 * wanted.sum(), name


def test_experts_count_their_own_tokens(tmp_path: Path, reference_folder: Path) -> None:
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, tiny_moe_config())
    result = calibrate(open_checkpoint(folder), tmp_path / "imatrix.gguf", SETTINGS)
    model, config = load_theirs(folder), open_checkpoint(folder).config
    counts = np.zeros((config.num_layers, config.num_experts))
    with torch.no_grad():
        for ids in samples_of(folder):
            routed = model(torch.from_numpy(ids.astype(np.int64))[None], output_router_logits=True).router_logits
            for layer, logits in enumerate(routed):
                chosen = logits.topk(config.experts_per_token, -1).indices.reshape(-1)
                counts[layer] += np.bincount(chosen.numpy(), minlength=config.num_experts)
    found = read_imatrix(tmp_path / "imatrix.gguf")
    for layer in range(config.num_layers):
        for part in ("gate", "up", "down"):
            entry = found.entries[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert np.abs(entry.counts - counts[layer]).sum() <= 0.02 * counts[layer].sum()
            assert ((entry.sums > 0).any(1) == (entry.counts > 0)).all()
        assert found.entries[f"blk.{layer}.attn_q.weight"].counts.tolist() == [6 * 48]
    assert result["experts"]["min_tokens"] == min(found.entries["blk.0.ffn_up_exps.weight"].counts.min(),
                                                  found.entries["blk.1.ffn_up_exps.weight"].counts.min())  # fmt: skip


def test_bytes_do_not_depend_on_threads(reference_folder: Path, matrix: Path, tmp_path: Path) -> None:
    calibrate(open_checkpoint(reference_folder), tmp_path / "imatrix.gguf", QuantizeSettings(
        samples=6, sequence_length=48, threads=2))  # fmt: skip
    assert (tmp_path / "imatrix.gguf").read_bytes() == matrix.read_bytes()


class _Text(C.Structure):
    """libstdc++'s std::string."""

    _fields_ = (("data", C.c_char_p), ("size", C.c_size_t), ("capacity", C.c_size_t), ("rest", C.c_size_t))


def loaded_by_llama_cpp(path: Path) -> tuple[bool, int]:
    """What llama.cpp's own loader says of a file: whether it is one, and how many tensors are in it."""
    llama_quantize.libraries()
    library = C.CDLL(str(llama_quantize.folder() / "libllama-common.so.0"))
    load = library._Z19common_imatrix_loadRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEER14common_imatrix
    load.restype = C.c_bool
    name = str(path).encode()
    text = _Text(name, len(name), len(name), 0)
    # std::map: compare, then the header node (color, parent, leftmost, rightmost) and the count; then the rest.
    found = (C.c_uint64 * 64)()
    found[3] = found[4] = C.addressof(found) + 8
    return load(C.byref(text), C.byref(found)), found[5]


def test_llama_cpp_loads_ours(matrix: Path) -> None:
    assert loaded_by_llama_cpp(matrix) == (True, 42)


def test_llama_cpp_quantizes_with_ours(reference_folder: Path, matrix: Path, tmp_path: Path) -> None:
    checkpoint, found = open_checkpoint(reference_folder), read_imatrix(matrix)
    export_gguf(checkpoint, tmp_path / "bf16.gguf", "bf16")
    means = {name: entry.means for name, entry in found.entries.items()}
    llama_quantize.quantize(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", 15, means)
    tensors = gguf_tensors(tmp_path / "theirs.gguf")
    weight = checkpoint.read("model.layers.2.mlp.up_proj.weight").astype(np.float32)
    wanted = ggml.quantize_rows(weight, "q4_k", means["blk.2.ffn_up.weight"][0])
    np.testing.assert_array_equal(tensors["blk.2.ffn_up.weight"].data.reshape(wanted.shape), wanted)
    options = Options(importance=found)
    export_gguf(checkpoint, tmp_path / "ours.gguf", "q4_k_m", options=options)
    ours = gguf_tensors(tmp_path / "ours.gguf")
    assert {name: t.tensor_type for name, t in ours.items()} == {name: t.tensor_type for name, t in tensors.items()}
    assert (tmp_path / "ours.gguf").stat().st_size == pytest.approx((tmp_path / "theirs.gguf").stat().st_size, rel=5e-3)


@pytest.mark.parametrize("ftype", [("q4_0", 2), ("q5_0", 8), ("iq4_xs", 30)])
def test_types_with_a_matrix_are_llama_cpps(
    reference_folder: Path, matrix: Path, tmp_path: Path, ftype: tuple[str, int]
) -> None:
    """Where the matrix changes the mix, which `llama_quant_compute_types` is not told of."""
    checkpoint, found = open_checkpoint(reference_folder), read_imatrix(matrix)
    export_gguf(checkpoint, tmp_path / "bf16.gguf", "bf16")
    means = {name: entry.means for name, entry in found.entries.items()}
    llama_quantize.quantize(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", ftype[1], means)
    export_gguf(checkpoint, tmp_path / "ours.gguf", ftype[0], options=Options(importance=found))
    kinds = [
        {name: t.tensor_type for name, t in gguf_tensors(tmp_path / f"{who}.gguf").items()}
        for who in ("ours", "theirs")
    ]
    assert kinds[0] == kinds[1]


def theirs(path: Path, values: dict[str, NDArray], counts: int) -> Path:
    """A matrix of the GGUF form, written by gguf-py."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in values.items():
        writer.add_tensor(f"{name}.in_sum2", array)
        writer.add_tensor(f"{name}.counts", np.full((len(array), 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(path: Path, values: dict[str, NDArray], calls: int) -> Path:
    """The older form."""
    data = struct.pack("<i", len(values))
    for name, array in values.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, array.size)
        data += array.astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", 3, 8) + b"wiki.txt")
    return path


@pytest.mark.parametrize("write", [theirs, legacy])
def test_ours_quantizes_with_theirs(
    reference_folder: Path, tmp_path: Path, write: Callable[[Path, dict, int], Path]
) -> None:
    checkpoint, random = open_checkpoint(reference_folder), np.random.default_rng(0)
    name, module = "blk.2.ffn_up.weight", "model.layers.2.mlp.up_proj"
    values = {name: np.exp(1.5 * random.standard_normal((1, 256))).astype(np.float32)}
    path = write(tmp_path / "theirs.imatrix", values, 4)
    assert loaded_by_llama_cpp(path) == (True, 1)
    found = read_imatrix(path)
    assert (found.chunks, list(found.datasets)) == (3, ["wiki.txt"])
    np.testing.assert_allclose(found.entries[name].means, values[name] / 4)
    export_gguf(checkpoint, tmp_path / "weighed.gguf", "q4_k_s", options=Options(importance=found))
    export_gguf(checkpoint, tmp_path / "plain.gguf", "q4_k_s")
    weight, error = checkpoint.read(f"{module}.weight").astype(np.float64), {}
    for label in ("weighed", "plain"):
        tensor = gguf_tensors(tmp_path / f"{label}.gguf")[name]
        missed = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape) - weight
        error[label] = float((missed**2 * values[name]).sum())
    assert error["weighed"] < 0.9 * error["plain"]
    header = gguf.GGUFReader(tmp_path / "weighed.gguf").fields
    assert header["quantize.imatrix.entries_count"].contents() == 1


def test_experts_of_the_older_form(reference_folder: Path, tmp_path: Path) -> None:
    folder = tiny_with_tokenizer(tmp_path / "moe", reference_folder, tiny_moe_config())
    values = np.arange(8 * 64, dtype=np.float32).reshape(8, 64)
    found = read_imatrix(legacy(tmp_path / "old", {"blk.0.ffn_up_exps.weight": values}, 1))
    means = found.for_model(open_checkpoint(folder).config)
    np.testing.assert_array_equal(means["blk.0.ffn_up_exps.weight"], values)


BROKEN = {
    "another model": {"blk.0.attn_q.weight": np.ones((1, 64), np.float32)},
    "no tensor": {"blk.99.attn_q.weight": np.ones((1, 64), np.float32)},
    "negative": {"blk.0.attn_q.weight": np.full((1, 256), -1, np.float32)},
}


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN.keys())
def test_what_does_not_belong_to_the_model(reference_folder: Path, tmp_path: Path, values: dict) -> None:
    found = read_imatrix(theirs(tmp_path / "theirs.gguf", values, 1))
    with pytest.raises(InputError, match=r"theirs\.gguf"):
        export_gguf(
            open_checkpoint(reference_folder), tmp_path / "out.gguf", "q4_k_m", options=Options(importance=found)
        )
    assert not (tmp_path / "out.gguf").exists()


def test_files_that_are_none(tmp_path: Path, matrix: Path) -> None:
    (tmp_path / "text").write_text("not an importance matrix at all")
    (tmp_path / "short").write_bytes(matrix.read_bytes()[:-100])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "short", "empty", "missing"):
        with pytest.raises(InputError):
            read_imatrix(tmp_path / name)


def test_no_token_means_one() -> None:
    entry = ImatrixEntry(np.zeros((2, 3), np.float32), np.array([0, 2], np.float32))
    np.testing.assert_array_equal(entry.means, [[1, 1, 1], [0, 0, 0]])
    assert Imatrix({"a": entry}).name == "imatrix.gguf"
