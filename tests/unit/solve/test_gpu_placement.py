"""Where tensors lie when a GPU solves: no operation mixes them with the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.recipe import Recipe, load_recipe
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from qwen3_export.solve.rounding.row_chunks import _code_bytes
from tests.conftest import copy_tokenizer, tiny_config, tiny_moe_config, write_checkpoint
from tests.unit.solve.pretended_gpu import GPU, pretended_gpu

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "rope_theta": 1e6,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 64,
}
MODELS = {
    "dense": tiny_config(**SHAPE, intermediate_size=256),
    "moe": tiny_moe_config(
        **SHAPE, intermediate_size=256, moe_intermediate_size=256, num_experts=3, tie_word_embeddings=False
    ),
}
SCHEMES = [
    QuantScheme(type="kquant", ggml_type="iq4_nl"),
    QuantScheme(4, type="float", group_size=16, scale_dtype="e4m3"),
    QuantScheme(8, type="float", strategy="channel"),
]
# What differs in where it works: every method, folds, measured outputs, refits, inputs' scales, block types.
RECIPES = {
    "dense": [
        "awq-gptq-w4a16-g128",
        "gptq-fp8-dynamic",
        "int8-smooth-dynamic",
        "nvfp4-w4a4",
        "gguf-q2_k",
    ],
    "moe": ["gptq-w4a16-g128", "fp8-static", "edge-w4", "edge-w8"],
}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory, reference_folder: Path) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            folder = write_checkpoint(tmp_path_factory.mktemp("source") / kind, MODELS[kind])
            copy_tokenizer(reference_folder, folder)
            made[kind] = open_checkpoint(folder)
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in RECIPES.items() for name in names])
def test_every_method_keeps_its_tensors_on_one_device(
    kind: str, name: str, source_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = source_of(kind)
    settings = QuantizeSettings(samples=9, sequence_length=32, device="cuda", threads=1)
    with pretended_gpu(monkeypatch):
        quantize(checkpoint, load_recipe(name).for_model(checkpoint.config), tmp_path / "out", settings)
    assert open_checkpoint(tmp_path / "out").schemes


def test_a_code_book_keeps_its_tensors_on_one_device(
    source_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one linear, since its columns run in torch."""
    values = {"name": "test", "method": "gptq", "rules": [{"match": "*.k_proj", "scheme": "iq4_xs"}], "layout": "ggml"}
    recipe = Recipe.from_dict({**values, "options": {"scale_search": "solve", "descent": 1}}, "test")
    settings = QuantizeSettings(samples=9, sequence_length=32, device="cuda", threads=1)
    with pretended_gpu(monkeypatch):
        quantize(source_of("dense"), recipe, tmp_path / "out", settings)
    assert len(open_checkpoint(tmp_path / "out").schemes) == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_codes_of_floats_and_code_books_come_back(scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their columns run in torch, slowly where a GPU is pretended; what is stored is made of them here."""
    block = scheme.block_type
    values = torch.tensor([-6.0, -0.5, 0.0, 1.5, 4.0] if block is None else list(block.values or ()))
    wanted = _code_bytes(values, scheme)
    with pretended_gpu(monkeypatch):
        assert torch.equal(_code_bytes(values.to("cuda"), scheme), wanted)


def test_the_pretended_gpu_fails_as_cuda_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (here.device.type, there.device, (2 * there)[:2].device) == ("cpu", GPU, GPU)
        assert (there * torch.tensor(2.0)).is_cuda
        assert there[torch.tensor([0, 2])].is_cuda
        assert (there.cpu() + here).numpy().tolist() == [2, 2, 2]
        assert (here.to("cuda", torch.float64) + there).dtype == torch.float64
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            torch.zeros(3, device="cuda").index_add_(0, torch.tensor([0]), there[:1])
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
