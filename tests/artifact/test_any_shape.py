"""Property tests of the exports: whatever the model's shape and the scheme, a format holds the solver's numbers
or says in advance that it cannot."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor, dequantize
from qwen3_export.errors import UnsupportedError
from qwen3_export.ship import gguf as gguf_format
from qwen3_export.ship.onnx import export_onnx, ort_ops, standard_ops
from tests.artifact import ort_folders, test_onnx_standard
from tests.artifact.support import (
    VOCABULARY,
    Exported,
    gguf_name,
    gguf_tensors,
    read_blocks,
    round_to_nearest,
    with_tokenizer,
)
from tests.conftest import tiny_config, write_checkpoint


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], QuantScheme]:
    """One block of any shape, and a scheme whose groups divide it."""
    heads, shared, symmetric = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.booleans())
    group = draw(st.sampled_from([16, 32, 64]))
    config = tiny_config(
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        hidden_size=group * draw(st.integers(1, 4)),
        intermediate_size=group * draw(st.integers(1, 5)),
        num_attention_heads=heads * shared,
        num_key_value_heads=heads,
        head_dim=draw(st.sampled_from([group, 2 * group])),
    )
    scheme = QuantScheme(
        num_bits=draw(st.sampled_from([2, 3, 4, 8])),
        symmetric=symmetric,
        strategy=draw(st.sampled_from(["group", "group", "group", "channel"])),
        group_size=group,
        signed_scales=symmetric and draw(st.booleans()),
    )
    return config, scheme


@pytest.fixture(scope="module")
def rounded(reference_folder: Path) -> Iterator[Callable[..., Checkpoint]]:
    """`rounded(config, scheme)` → a random model, rounded."""
    with tempfile.TemporaryDirectory() as base:

        def make(config: dict[str, Any], scheme: QuantScheme) -> Checkpoint:
            folder = Path(tempfile.mkdtemp(dir=base))
            source = with_tokenizer(write_checkpoint(folder / "source", config), reference_folder)
            return round_to_nearest(source, folder / "quantized", ("*", scheme))

        yield make


def exported(checkpoint: Checkpoint, reason: str | None, write: Callable[[Path], dict[str, Any]]) -> Exported | None:
    """The artifact; None where the scheme is refused, which leaves nothing behind."""
    output = checkpoint.folder.with_name("artifact")
    if reason is None:
        return Exported(output, write(output), checkpoint)
    with pytest.raises(UnsupportedError):
        write(output)
    assert not output.exists()
    return None


@settings(max_examples=25)
@given(models(), st.sampled_from(["ort", "standard"]))
def test_onnx(rounded: Callable[..., Checkpoint], sample: tuple[dict[str, Any], QuantScheme], flavor: str) -> None:
    checkpoint = rounded(*sample)
    operators, theirs = {"ort": (ort_ops, ort_folders), "standard": (standard_ops, test_onnx_standard)}[flavor]
    artifact = exported(
        checkpoint, operators.supports(sample[1]), lambda output: export_onnx(checkpoint, output, flavor)
    )
    if artifact is not None:
        theirs.check_codes(artifact)
        assert artifact.result["exact"] is True


@settings(max_examples=15)
@given(models())
def test_gguf(rounded: Callable[..., Checkpoint], sample: tuple[dict[str, Any], QuantScheme]) -> None:
    checkpoint = rounded(*sample)
    reason = gguf_format.supports(sample[1])
    artifact = exported(checkpoint, reason, lambda output: gguf_format.export_gguf(checkpoint, output))
    # gguf-py does not know q2_0, which has tests of its own with llama.cpp.
    if artifact is None or sample[1].num_bits == 2:
        return
    tensors = gguf_tensors(artifact.path)
    for module in artifact.linears:
        wanted, tensor = checkpoint.linear(module), tensors[gguf_name(module)]
        assert isinstance(wanted, QuantizedTensor)
        np.testing.assert_array_equal(read_blocks(tensor.data, tensor.tensor_type).codes, wanted.codes)
        if wanted.zeros is None:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(weight, dequantize(wanted))
    assert artifact.result["exact"] is (sample[1].symmetric or not artifact.result["inexact_tensors"])
