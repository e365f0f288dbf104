"""Every type of a GGUF file, dense and MoE, in llama.cpp against torch with the file's weights; requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.gguf_header import GgufTensor, read_gguf_header
from qwen3_export.core.gguf_types import FILE_TYPES, Overrides, block_size, gguf_name, module_types
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.gguf import Options, export_gguf
from tests.artifact.support import (
    SAME,
    VOCABULARY,
    expand_to_f32,
    largest_difference,
    logits,
    mean_kl,
    random_ids,
    round_to_nearest,
    with_tokenizer,
)
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint
from tests.reference.ggml import dequantize_row

DENSE = tiny_config(hidden_size=256, intermediate_size=512, vocab_size=VOCABULARY, head_dim=64)
MOE = tiny_moe_config(hidden_size=256, moe_intermediate_size=256, vocab_size=VOCABULARY, head_dim=64, num_experts=4)
# llama.cpp rounds activations to 8 bits beside quantized weights, and random weights amplify it.
LIMIT = 0.02
IDS = [random_ids(48, 8185)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("types")

    def get(kind: str) -> Path:
        folder = base / kind
        if not folder.exists():
            config = DENSE if kind == "dense" else MOE
            tensors = random_tensors(parse_config(config, "test"))
            # Less than support's: sharper answers than these would amplify the rounding of activations.
            scaled = {name: (array * 0.6).astype(array.dtype) for name, array in tensors.items() if array.ndim == 2}
            tensors |= scaled
            with_tokenizer(write_checkpoint(folder, config, tensors), reference_folder)
        return folder

    return get


def stored_weights(path: Path, checkpoint: Checkpoint) -> dict[str, NDArray]:
    """Every matrix of a file in fp32 by Hugging Face name, expanded row by row by libggml."""
    reader, found = {t.name: t for t in read_tensors(path)}, {}
    for module, (rows, inputs) in checkpoint.config.all_matrices().items():
        tensor = reader[f"{gguf_name(module)}.weight"]
        part = int(module.partition(".experts.")[2].partition(".")[0]) if ".experts." in module else 0
        block, size = block_size(tensor.type)
        matrix = rows * inputs // block * size
        raw = np.fromfile(path, np.uint8, matrix, offset=tensor.begin + part * matrix).reshape(rows, -1)
        found[f"{module}.weight"] = expand(raw, tensor.type, inputs)
    return found


def read_tensors(path: Path) -> tuple[GgufTensor, ...]:
    return read_gguf_header(path).tensors


def expand(raw: NDArray[np.uint8], name: str, inputs: int) -> NDArray[np.float32]:
    if name in ("f32", "f16"):
        return raw.view(np.float32 if name == "f32" else np.float16).astype(np.float32)
    return np.stack([dequantize_row(row, name, inputs) for row in raw])


def with_weights(source: Path, folder: Path, weights: dict[str, NDArray], config: dict[str, Any]) -> Path:
    """The checkpoint with other matrices, all in fp32."""
    checkpoint = open_checkpoint(source)
    rest = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.files if name not in weights}
    return write_checkpoint(folder, config, {**rest, **weights})


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("name", FILE_TYPES)
def test_llama_cpp_runs_every_type(tiny: Callable[[str], Path], tmp_path: Path, name: str, kind: str) -> None:
    source, config = tiny(kind), DENSE if kind == "dense" else MOE
    checkpoint, path = open_checkpoint(source), tmp_path / "model.gguf"
    export_gguf(checkpoint, path, name)
    types = module_types(checkpoint.config, name)
    stored = {t.name: t.type for t in read_tensors(path)}
    assert {module: stored[f"{gguf_name(module)}.weight"] for module in types} == types
    assert read_gguf_header(path).values["general.file_type"] == FILE_TYPES[name].number
    truth = with_weights(source, tmp_path / "truth", stored_weights(path, checkpoint), config)
    assert mean_kl(logits(truth, IDS), logits(path, IDS)) < LIMIT


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("name", ["q4_k_m", "q2_k", "iq4_xs", "q3_k_m", "q5_0", "q5_1", "iq4_nl", "mxfp4"])
def test_expanded_file_gives_torchs_logits(tiny: Callable[[str], Path], tmp_path: Path, name: str, kind: str) -> None:
    """In fp32 throughout, so that nothing hides a mistake."""
    source, config = tiny(kind), DENSE if kind == "dense" else MOE
    checkpoint, path = open_checkpoint(source), tmp_path / "model.gguf"
    export_gguf(checkpoint, path, name)
    truth = with_weights(source, tmp_path / "truth", stored_weights(path, checkpoint), config)
    expanded = expand_to_f32(path, tmp_path / "expanded.gguf")
    assert largest_difference(logits(expanded, IDS, exact=True), logits(truth, IDS)) < SAME


def test_rounding_is_the_same_in_two_runs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = (
        export_gguf(open_checkpoint(tiny("moe")), tmp_path / f"{i}.gguf", "q4_k_m")["files"][0]["sha256"] for i in "ab"
    )
    assert first == second


def test_losses_are_named_tensor_by_tensor(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, path = open_checkpoint(tiny("dense")), tmp_path / "model.gguf"
    result = export_gguf(checkpoint, path, "q4_k_m")
    assert result["exact"] is False
    found = {item["name"]: item["max_rel_error"] for item in result["inexact_tensors"]}
    for name, weight in stored_weights(path, checkpoint).items():
        original = checkpoint.read(name).astype(np.float32)
        assert found.pop(name) == pytest.approx(np.abs(weight - original).max() / np.abs(original).max(), rel=1e-3)
    assert not found


# Types on request


def test_types_that_were_asked_for(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, path = open_checkpoint(tiny("dense")), tmp_path / "model.gguf"
    overrides = Overrides((("attn_v", "q8_0"), (r"blk\.1\.ffn", "iq4_xs")), token_embedding="q5_k")
    export_gguf(checkpoint, path, "q4_k_s", options=Options(overrides))
    types = {t.name: t.type for t in read_tensors(path)}
    assert (types["token_embd.weight"], types["blk.1.attn_v.weight"]) == ("q5_k", "q8_0")
    assert (types["blk.1.ffn_up.weight"], types["blk.0.ffn_up.weight"]) == ("iq4_xs", "q4_k")
    assert np.isfinite(logits(path, IDS)[0]).all()


def test_what_stays_16_bit_beside_codes_may_be_rounded(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = round_to_nearest(tiny("dense"), tmp_path / "quantized", ("*", QuantScheme(4, group_size=32)))
    export_gguf(checkpoint, tmp_path / "model.gguf", options=Options(Overrides(token_embedding="q6_k")))
    types = {t.name: t.type for t in read_tensors(tmp_path / "model.gguf")}
    assert (types["token_embd.weight"], types["blk.0.ffn_up.weight"]) == ("q6_k", "q4_0")


# Codes: exact, or rounded again on request


def test_symmetric_two_bits_are_moved_exactly(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    scheme = QuantScheme(2, group_size=128, scale_dtype="fp16")
    checkpoint = round_to_nearest(tiny("moe"), tmp_path / "quantized", ("*", scheme))
    result = export_gguf(checkpoint, tmp_path / "model.gguf")
    assert result["exact"]
    assert read_gguf_header(tmp_path / "model.gguf").values["general.file_type"] == FILE_TYPES["q2_0"].number
    check_same_weights(tmp_path / "model.gguf", checkpoint)
    assert mean_kl(logits(tmp_path / "quantized", IDS), logits(tmp_path / "model.gguf", IDS)) < LIMIT


def check_same_weights(path: Path, checkpoint: Checkpoint) -> None:
    for name, weight in stored_weights(path, checkpoint).items():
        stored = checkpoint.linear(name.removesuffix(".weight"))
        wanted = dequantize(stored) if isinstance(stored, QuantizedTensor) else stored.astype(np.float32)
        np.testing.assert_array_equal(weight, wanted, name)


def test_mxfp4_is_moved_exactly(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    scheme = QuantScheme(4, "float", group_size=32, scale_dtype="e8m0")
    checkpoint = round_to_nearest(tiny("dense"), tmp_path / "quantized", ("*", scheme))
    assert export_gguf(checkpoint, tmp_path / "model.gguf")["exact"]
    check_same_weights(tmp_path / "model.gguf", checkpoint)


UNHELD = {
    "3 bits": QuantScheme(3, group_size=64),
    "FP8": QuantScheme(8, "float", strategy="channel", group_size=None),
    "asymmetric groups of 16": QuantScheme(4, group_size=16, symmetric=False),
}


@pytest.mark.parametrize("scheme", UNHELD.values(), ids=UNHELD.keys())
def test_what_no_type_holds_is_rounded_on_request_alone(
    tiny: Callable[[str], Path], tmp_path: Path, scheme: QuantScheme
) -> None:
    checkpoint = round_to_nearest(tiny("dense"), tmp_path / "quantized", ("*.mlp.*", scheme))
    with pytest.raises(UnsupportedError, match=r"nearest type is \w+: [\d.]+ bits per weight in place of") as caught:
        export_gguf(checkpoint, tmp_path / "model.gguf")
    assert "--allow-requantize" in str(caught.value.hint)
    assert not (tmp_path / "model.gguf").exists()
    result = export_gguf(checkpoint, tmp_path / "model.gguf", options=Options(allow_requantize=True))
    assert {item["name"] for item in result["requantized"]} == set(checkpoint.schemes)
    for item in result["requantized"]:
        assert item["from"] == scheme.label
        assert f"nearest type is {item['to']}:" in str(caught.value)
    for name, weight in stored_weights(tmp_path / "model.gguf", checkpoint).items():
        stored = checkpoint.linear(name.removesuffix(".weight"))
        wanted = dequantize(stored) if isinstance(stored, QuantizedTensor) else stored.astype(np.float32)
        assert ((weight - wanted) ** 2).sum() < 2e-4 * (wanted**2).sum(), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_few_bits_fit_into_four_as_they_are(
    tiny: Callable[[str], Path], tmp_path: Path, bits: int, symmetric: bool
) -> None:
    scheme = QuantScheme(bits, group_size=32, symmetric=symmetric)
    checkpoint = round_to_nearest(tiny("dense"), tmp_path / "quantized", ("*.mlp.*", scheme))
    result = export_gguf(checkpoint, tmp_path / "model.gguf", options=Options(allow_requantize=True))
    assert {item["to"] for item in result["requantized"]} == {"q4_0" if symmetric else "q4_1"}
    if symmetric:
        assert result["exact"]
        check_same_weights(tmp_path / "model.gguf", checkpoint)
    assert all(item["name"].endswith(".minimums") for item in result["inexact_tensors"])


def test_another_type_on_request(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = round_to_nearest(tiny("dense"), tmp_path / "quantized", ("*", QuantScheme(8, group_size=32)))
    options = Options(allow_requantize=True)
    result = export_gguf(checkpoint, tmp_path / "model.gguf", "q4_k_m", options=options)
    types = module_types(checkpoint.config, "q4_k_m")
    stored = {t.name: t.type for t in read_tensors(tmp_path / "model.gguf")}
    assert {module: stored[f"{gguf_name(module)}.weight"] for module in types} == types
    assert len(result["requantized"]) == len(checkpoint.schemes)
