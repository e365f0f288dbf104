"""GGUF files in llama.cpp, proved in two steps, because llama.cpp rounds activations to the weights' partner type:
the file's tensors expanded to fp32 give our torch forward pass's logits, which proves names, metadata, codes and
scales; the file as it is shipped then stays within that rounding of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import InputError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship.gguf import export_gguf
from tests.artifact.support import (
    SAME,
    THREADS,
    TINY,
    expand_to_f32,
    largest_difference,
    logits,
    mean_kl,
    random_ids,
    round_to_nearest,
    tiny_with_tokenizer,
)
from tests.conftest import tiny_config, tiny_moe_config

EXACT_CODES = ["gptq-w4a16-g128", "gptq-w4a16-g32", "rtn-w8a16"]


@pytest.mark.parametrize("name", ["original", *EXACT_CODES])
def test_expanded_file_gives_torchs_logits(
    expanded_gguf: Callable, torch_logits: Callable, rows: list[NDArray], name: str
) -> None:
    assert largest_difference(logits(expanded_gguf(name), rows, exact=True), torch_logits(name)) < SAME


def test_expanded_q4_1_differs_by_its_fp16_minimums_alone(
    expanded_gguf: Callable, torch_logits: Callable, rows: list[NDArray]
) -> None:
    name = "gptq-w4a16-g32-asym"
    expanded = logits(expanded_gguf(name), rows, exact=True)
    assert SAME < largest_difference(expanded, torch_logits(name)) < 0.02
    assert mean_kl(torch_logits(name), expanded) < 1e-6


# KL measured: 1.4e-5 (activations in bf16), 2.5e-7 (fp16), 1.2e-4 to 3e-4 (8 bits).
ARITHMETIC = [
    ("original", "bf16", 1e-4),
    ("original", "f16", 1e-5),
    ("gptq-w4a16-g128", None, 1e-3),
    ("gptq-w4a16-g32", None, 1e-3),
    ("gptq-w4a16-g32-asym", None, 1e-3),
    ("rtn-w8a16", None, 1e-3),
]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("name", "type_name", "limit"), ARITHMETIC)
def test_shipped_file_stays_within_its_arithmetic(
    gguf_file: Callable,
    torch_logits: Callable,
    rows: list[NDArray],
    name: str,
    type_name: str | None,
    limit: float,
    exact: bool,
) -> None:
    assert mean_kl(torch_logits(name), logits(gguf_file(name, type_name).path, rows, exact)) < limit


def test_q8_0_of_the_original_is_near_lossless(
    gguf_file: Callable, torch_logits: Callable, rows: list[NDArray]
) -> None:
    assert mean_kl(torch_logits("original"), logits(gguf_file("original", "q8_0").path, rows)) < 2e-3


def test_rows_longer_than_a_batch(expanded_gguf: Callable, rows: list[NDArray], reference_folder: Path) -> None:
    """llama.cpp is given 512 tokens at a time; its RoPE angles are fp32 products, worse at later positions."""
    ids = [np.concatenate(rows)[:600]]
    ours, truth = logits(expanded_gguf("original"), ids, exact=True), logits(reference_folder, ids)
    assert largest_difference(ours, truth) < 5 * SAME


@pytest.mark.parametrize(("name", "tolerance"), [("original", SAME), ("gptq-w4a16-g32", SAME)])
def test_decoding_token_by_token_equals_one_prefill(
    expanded_gguf: Callable, rows: list[NDArray], name: str, tolerance: float
) -> None:
    session = open_session(expanded_gguf(name), RuntimeOptions(threads=THREADS, exact=True))
    ids = rows[0][:48]
    whole = session.prefill(ids)
    pieces = [session.prefill(ids[:20]), *(session.decode(int(token))[None] for token in ids[20:])]
    assert np.abs(np.concatenate(pieces) - whole).max() < tolerance
    session.close()


def test_decoding_the_shipped_file_stays_close_to_its_prefill(gguf_file: Callable, rows: list[NDArray]) -> None:
    session = open_session(gguf_file("gptq-w4a16-g128").path, RuntimeOptions(threads=THREADS))
    ids = rows[0][:48]
    whole = session.prefill(ids)
    pieces = [session.prefill(ids[:20]), *(session.decode(int(token))[None] for token in ids[20:])]
    assert mean_kl([whole], [np.concatenate(pieces)]) < 1e-3
    session.close()


def test_a_new_prefill_forgets_the_last_sequence(gguf_file: Callable, rows: list[NDArray]) -> None:
    session = open_session(gguf_file("gptq-w4a16-g128").path, RuntimeOptions(threads=1))
    fresh = session.prefill(rows[0])
    session.prefill(rows[1])
    session.decode(5)
    np.testing.assert_array_equal(session.prefill(rows[0]), fresh)
    session.close()


def test_what_does_not_fit_is_an_input_error(gguf_file: Callable) -> None:
    session = open_session(gguf_file("gptq-w4a16-g128").path, RuntimeOptions(threads=1, context=64))
    for ids in (np.arange(65), np.array([8192]), np.array([-1])):
        with pytest.raises(InputError):
            session.prefill(ids.astype(np.int32))
    assert session.prefill(np.arange(64, dtype=np.int32)).shape == (64, 8192)
    with pytest.raises(InputError):
        session.decode(1)
    session.close()


@pytest.mark.parametrize("changes", TINY.values(), ids=TINY.keys())
def test_small_models(tmp_path: Path, reference_folder: Path, changes: dict) -> None:
    folder = tiny_with_tokenizer(tmp_path / "tiny", reference_folder, tiny_config(**changes))
    check_two_steps(folder, tmp_path)


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts_per_tok": 3, "tie_word_embeddings": True}], ids=["top 2", "top 3"]
)
def test_experts(tmp_path: Path, reference_folder: Path, changes: dict) -> None:
    check_two_steps(tiny_with_tokenizer(tmp_path / "moe", reference_folder, tiny_moe_config(**changes)), tmp_path)


def test_quantized_experts(tmp_path: Path, reference_folder: Path) -> None:
    config = tiny_moe_config(moe_intermediate_size=64)
    source = tiny_with_tokenizer(tmp_path / "moe", reference_folder, config)
    folder = tmp_path / "quantized"
    round_to_nearest(source, folder, ("*.mlp.*", QuantScheme(4, group_size=32)))
    check_two_steps(folder, tmp_path, limit=0.05)


def test_mixed_recipe(tmp_path: Path, reference_folder: Path) -> None:
    source = tiny_with_tokenizer(tmp_path / "tiny", reference_folder)
    rules = [
        ("*.layers.1.self_attn.q_proj", None),
        ("*.down_proj", QuantScheme(8, group_size=32)),
        ("*", QuantScheme(4, group_size=32)),
    ]
    round_to_nearest(source, tmp_path / "quantized", *rules)
    check_two_steps(tmp_path / "quantized", tmp_path, limit=0.05)


def check_two_steps(folder: Path, scratch: Path, limit: float = 0.005) -> None:
    """Expanded: torch's logits; as shipped: within llama.cpp's rounding (random weights amplify it)."""
    ids = [random_ids(100, 8185)]
    export_gguf(open_checkpoint(folder), scratch / "model.gguf")
    wanted = logits(folder, ids)
    expanded = expand_to_f32(scratch / "model.gguf", scratch / "expanded.gguf")
    assert largest_difference(logits(expanded, ids, exact=True), wanted) < SAME
    assert mean_kl(wanted, logits(scratch / "model.gguf", ids)) < limit
