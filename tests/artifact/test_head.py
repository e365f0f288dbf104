"""Quantized embedding and head in every runtime: the stored numbers are the solver's, a tied matrix is there once, and
logits are those of our torch forward pass on the same codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.qwen3 import EMBEDDING, HEAD
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.ship.tensorrt import check_request, export_tensorrt
from qwen3_export.ship.tensorrt.plan_file import stored_share
from qwen3_export.ship.tensorrt.profiles import Profile
from tests.artifact.plans import header
from tests.artifact.support import (
    SAME,
    VOCABULARY,
    OnnxWeights,
    expand_to_f32,
    gguf_tensors,
    largest_difference,
    load_graph,
    logits,
    low_bits_first,
    mean_kl,
    random_ids,
    read_blocks,
    round_to_nearest,
    tiny_with_tokenizer,
)
from tests.conftest import tiny_config

W4, W8 = QuantScheme(4, group_size=32), QuantScheme(8, group_size=32)
ASYMMETRIC = QuantScheme(4, symmetric=False, group_size=32)
SIGNED = QuantScheme(4, group_size=32, signed_scales=True)
# Embedding and head; the second is ignored where they are tied.
SCHEMES: dict[str, tuple[QuantScheme | None, QuantScheme | None]] = {
    "8 bits": (W8, W8),
    "4 bits": (W4, W4),
    "4 bits, zero points": (ASYMMETRIC, ASYMMETRIC),
    "signed scales": (SIGNED, SIGNED),
    "8 bits in, 4 bits out": (W8, W4),
    "4 bits in, 16 out": (W4, None),
    "16 bits in, 8 out": (None, W8),
}
CASES = [(name, tied) for name in SCHEMES for tied in (True, False) if not tied or SCHEMES[name][0] == SCHEMES[name][1]]
IDS = [f"{name}, {'tied' if tied else 'untied'}" for name, tied in CASES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Callable[[str, bool], Checkpoint]:
    """`made(name, tied)` → a tiny model, rounded."""
    base, found = tmp_path_factory.mktemp("head"), dict[tuple[str, bool], Checkpoint]()

    def get(name: str, tied: bool) -> Checkpoint:
        if (name, tied) not in found:
            config, folder = tiny_config(tie_word_embeddings=tied), base / str(len(found))
            source = tiny_with_tokenizer(folder / "source", reference_folder, config)
            embedding, head = SCHEMES[name]
            outer = [(EMBEDDING, embedding)] if tied else [(EMBEDDING, embedding), (HEAD, head)]
            found[name, tied] = round_to_nearest(source, folder / "quantized", *outer, ("*", W4))
        return found[name, tied]

    return get


@pytest.fixture(scope="module")
def ids() -> list[NDArray[np.int32]]:
    return [random_ids(40, VOCABULARY), random_ids(9, VOCABULARY, 8)]


def codes(checkpoint: Checkpoint, module: str) -> QuantizedTensor:
    tensor = checkpoint.linear(module)
    assert isinstance(tensor, QuantizedTensor)
    return tensor


def stored_bytes(folder: Path) -> int:
    return (folder / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("flavor", ["ort", "standard"])
@pytest.mark.parametrize(("name", "tied"), CASES, ids=IDS)
def test_onnx_logits_equal_torch(
    made: Callable, tmp_path: Path, ids: list[NDArray], name: str, tied: bool, flavor: str
) -> None:
    checkpoint = made(name, tied)
    options: dict[str, Any] = {"accuracy_level": 0} if flavor == "ort" else {}
    assert export_onnx(checkpoint, tmp_path / "onnx", flavor, **options)["exact"]
    if flavor == "standard":
        onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)
    ours = logits(tmp_path / "onnx", ids, exact=True)
    assert largest_difference(ours, logits(checkpoint.folder, ids)) < SAME


@pytest.mark.parametrize(("name", "tied"), CASES, ids=IDS)
def test_ort_holds_the_codes(made: Callable, tmp_path: Path, name: str, tied: bool) -> None:
    checkpoint = made(name, tied)
    export_onnx(checkpoint, tmp_path / "onnx")
    weights = OnnxWeights(tmp_path / "onnx")
    lookup, head = weights.node("embedding"), weights.node("head")
    embedding_scheme, head_scheme = checkpoint.schemes.get(EMBEDDING), checkpoint.schemes.get(HEAD)
    assert (lookup.op_type == "GatherBlockQuantized") == (embedding_scheme is not None)
    assert (head.op_type == "MatMulNBits") == (tied or head_scheme is not None)
    nodes = [("embedding.codes", "embedding", EMBEDDING, embedding_scheme), ("head", "head", HEAD, head_scheme)]
    for holder, node, module, scheme in nodes:
        if scheme is None:
            continue
        wanted, blob = codes(checkpoint, module), next(a for a in weights.inputs(holder) if a is not None)
        blob = blob.reshape(len(blob), -1)
        np.testing.assert_array_equal(low_bits_first(blob, scheme.num_bits, wanted.shape[1]), wanted.codes)
        scales, *zeros = [a for a in weights.inputs(node) if a is not None and a is not blob][node == "head" :]
        np.testing.assert_array_equal(scales, wanted.scales32)
        if wanted.zeros is not None:
            np.testing.assert_array_equal(low_bits_first(zeros[0], 4, wanted.zeros.shape[1]), wanted.zeros)


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_a_tied_matrix_is_stored_once(made: Callable, tmp_path: Path, flavor: str) -> None:
    for tied in (True, False):
        export_onnx(made("8 bits", tied), tmp_path / f"{tied}", flavor)
    matrix = VOCABULARY * 64 * 1
    apart = stored_bytes(tmp_path / "False") - stored_bytes(tmp_path / "True")
    assert matrix < apart < 1.2 * matrix
    graph = load_graph(tmp_path / "True").graph
    readers = [node.name for node in graph.node if "model.embed_tokens.codes" in node.input]
    assert readers == (["embedding.codes", "head"] if flavor == "ort" else ["embedding.dequantized"])


@pytest.mark.parametrize(("name", "tied"), CASES, ids=IDS)
def test_gguf_logits_and_codes(made: Callable, tmp_path: Path, ids: list[NDArray], name: str, tied: bool) -> None:
    checkpoint = made(name, tied)
    result = export_gguf(checkpoint, tmp_path / "model.gguf")
    assert result["exact"] is (name != "4 bits, zero points")
    tensors = gguf_tensors(tmp_path / "model.gguf")
    assert ("output.weight" in tensors) is not tied
    for module, stored in ((EMBEDDING, "token_embd.weight"), (HEAD, "output.weight")):
        if module in checkpoint.schemes:
            wanted = codes(checkpoint, module)
            found = read_blocks(tensors[stored].data, tensors[stored].tensor_type)
            np.testing.assert_array_equal(found.codes, wanted.codes)
            np.testing.assert_array_equal(found.scales, wanted.scales32)
    expanded = logits(expand_to_f32(tmp_path / "model.gguf", tmp_path / "f32.gguf"), ids, exact=True)
    allowed = SAME if result["exact"] else 2e-2
    assert largest_difference(expanded, logits(checkpoint.folder, ids)) < allowed
    # As it is, llama.cpp looks up and multiplies with its own kernels for these types.
    assert largest_difference(logits(tmp_path / "model.gguf", ids), logits(checkpoint.folder, ids)) < 1


def test_the_file_is_called_after_its_linears(made: Callable, tmp_path: Path) -> None:
    assert export_gguf(made("8 bits", True), tmp_path / "a.gguf", "q4_0")["exact"]
    with pytest.raises(UnsupportedError, match="the codes of quantized are of type q4_0"):
        export_gguf(made("8 bits", True), tmp_path / "b.gguf", "q8_0")


CHANNEL = QuantScheme(8, strategy="channel")
MXFP4 = QuantScheme(4, type="float", group_size=32, scale_dtype="e8m0")


@pytest.mark.parametrize(
    ("scheme", "target", "message"),
    [
        (CHANNEL, "gguf", "lm_head .* group_size must be a multiple of 32"),
        (MXFP4, "ort", "lm_head .* 4-bit floats"),
        (MXFP4, "standard", "lm_head .* no ONNX runtime"),
        (QuantScheme(4, group_size=32, symmetric=False), "tensorrt", "lm_head .* no zero points"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, reference_folder: Path, scheme: QuantScheme, target: str, message: str
) -> None:
    source = tiny_with_tokenizer(tmp_path / "source", reference_folder, tiny_config(tie_word_embeddings=False))
    checkpoint = round_to_nearest(source, tmp_path / "quantized", (HEAD, scheme), ("*", W4))
    exports: dict[str, Callable[[], object]] = {
        "ort": lambda: export_onnx(checkpoint, tmp_path / "out"),
        "standard": lambda: export_onnx(checkpoint, tmp_path / "out", "standard"),
        "gguf": lambda: export_gguf(checkpoint, tmp_path / "out"),
        "tensorrt": lambda: check_request(checkpoint, "rtx", ("8.9",), "fp16"),
    }
    with pytest.raises(UnsupportedError, match=message):
        exports[target]()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_channel_wise_table_in_standard_operators(
    tmp_path: Path, reference_folder: Path, ids: list[NDArray], tied: bool
) -> None:
    source = tiny_with_tokenizer(tmp_path / "source", reference_folder, tiny_config(tie_word_embeddings=tied))
    asymmetric = QuantScheme(8, symmetric=False, strategy="channel")
    outer = [(EMBEDDING, asymmetric)] if tied else [(EMBEDDING, asymmetric), (HEAD, CHANNEL)]
    checkpoint = round_to_nearest(source, tmp_path / "quantized", *outer, ("*", W4))
    export_onnx(checkpoint, tmp_path / "onnx", "standard")
    ours = logits(tmp_path / "onnx", ids, exact=True)
    assert largest_difference(ours, logits(checkpoint.folder, ids)) < SAME


def test_tensorrt_keeps_a_tied_4_bit_matrix_once(
    tmp_path: Path, reference_folder: Path, rows: list[NDArray[np.int32]]
) -> None:
    """`export_tensorrt` itself refuses a plan with more weight bytes than its ONNX."""
    checkpoint = round_to_nearest(reference_folder, tmp_path / "quantized", (EMBEDDING, W4), ("*", W4))
    plain = round_to_nearest(reference_folder, tmp_path / "plain", ("*", W4))
    for name, source in (("trt", checkpoint), ("plain-trt", plain)):
        export_tensorrt(source, tmp_path / name, capabilities=("8.9",), profile=Profile(128, 512))
    small, large = (header(tmp_path / name / "model.plan")["weights"] for name in ("trt", "plain-trt"))
    # 2 bytes a weight against half a byte and a scale's share.
    assert large - small > 1.3 * VOCABULARY * 256
    assert stored_bytes(tmp_path / "trt") < stored_bytes(tmp_path / "plain-trt") - 1.3 * VOCABULARY * 256
    ours, truth = logits(tmp_path / "trt", rows), logits(checkpoint.folder, rows)
    assert largest_difference(ours, truth) < 0.05


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("eight", [W8, CHANNEL], ids=lambda scheme: scheme.label)
def test_tensorrt_keeps_an_8_bit_matrix_once(
    make_checkpoint: Callable, tmp_path: Path, eight: QuantScheme, tied: bool
) -> None:
    """Tied, its logits are (W x^T)^T: a table that is turned would be stored a second time."""
    source = make_checkpoint(
        tiny_config(vocab_size=2048, hidden_size=128, intermediate_size=128, tie_word_embeddings=tied)
    )
    outer = [(EMBEDDING, eight)] if tied else [(EMBEDDING, eight), (HEAD, eight)]
    checkpoint = round_to_nearest(source, tmp_path / "quantized", *outer, ("*", W4))
    export_tensorrt(checkpoint, tmp_path / "trt", capabilities=("8.9",), profile=Profile(32, 64))
    assert stored_share(tmp_path / "trt") < 1.1
    ids = [random_ids(40)]
    assert mean_kl(logits(checkpoint.folder, ids), logits(tmp_path / "trt", ids)) < 1e-4
