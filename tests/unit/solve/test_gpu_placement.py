"""Where tensors lie when a GPU solves: no operation mixes them with the CPU's, with any recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.recipe import load_recipe, recipe_names
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
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
    "moe": tiny_moe_config(**SHAPE, intermediate_size=256, moe_intermediate_size=256, num_experts=3),
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


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_keeps_its_tensors_on_one_device(
    name: str, kind: str, source_of: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = source_of(kind)
    settings = QuantizeSettings(samples=9, sequence_length=32, device="cuda", threads=1)
    with pretended_gpu(monkeypatch):
        quantize(checkpoint, load_recipe(name).for_model(checkpoint.config), tmp_path / "out", settings)
    assert open_checkpoint(tmp_path / "out").schemes


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
