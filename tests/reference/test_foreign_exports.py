"""Folders that other tools quantized, exported: the codes arrive."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.errors import InputError, UnsupportedError
from qwen3_export.ship import tensorrt
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.ort_folders import read_matmul
from tests.artifact.support import VOCABULARY, OnnxWeights, gguf_name, gguf_tensors, read_blocks, with_tokenizer
from tests.conftest import cli, tiny_config
from tests.reference import packers
from tests.reference.foreign import ALL

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture
def shipped(tmp_path: Path, reference_folder: Path) -> Callable[..., packers.Folder]:
    """A folder with a tokenizer, as GGUF needs one."""
    config = tiny_config(vocab_size=VOCABULARY, max_position_embeddings=512)

    def make(pack: Callable[..., packers.Folder], **options: Any) -> packers.Folder:
        folder = pack(tmp_path / "foreign", config=config, **options)
        with_tokenizer(folder.path, reference_folder)
        return folder

    return make


@pytest.mark.parametrize("pack", [packers.gptq, packers.awq])
@pytest.mark.parametrize("midpoint", [True, False])
def test_codes_arrive_in_onnx_and_gguf(
    shipped: Callable[..., packers.Folder], tmp_path: Path, pack: Callable[..., packers.Folder], midpoint: bool
) -> None:
    folder = shipped(pack, midpoint=midpoint)
    checkpoint = open_checkpoint(folder.path)
    export_onnx(checkpoint, tmp_path / "onnx")
    export_gguf(checkpoint, tmp_path / "model.gguf")
    weights, blocks = OnnxWeights(tmp_path / "onnx"), gguf_tensors(tmp_path / "model.gguf")
    for name, codes in folder.codes.items():
        found, _, zeros = read_matmul(weights, name)
        np.testing.assert_array_equal(found, codes)
        if not midpoint:
            np.testing.assert_array_equal(zeros, folder.zeros[name])
        stored = blocks[gguf_name(name)]
        kind = gguf.GGMLQuantizationType.Q4_0 if midpoint else gguf.GGMLQuantizationType.Q4_1
        assert stored.tensor_type == kind
        np.testing.assert_array_equal(read_blocks(stored.data, kind).codes, codes)


def test_an_order_is_refused_by_every_export(shipped: Callable[..., packers.Folder], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shipped(packers.gptq, midpoint=True, order=True).path)
    for export in (
        lambda: export_onnx(checkpoint, tmp_path / "onnx"),
        lambda: export_onnx(checkpoint, tmp_path / "onnx", "standard"),
        lambda: export_gguf(checkpoint, tmp_path / "model.gguf"),
        lambda: tensorrt.check_request(checkpoint, "rtx", ["8.9"], "fp16"),
    ):
        with pytest.raises(UnsupportedError, match="its groups are not consecutive inputs") as caught:
            export()
        assert "gptq-w4a16-g128, whose act_order needs no g_idx" in str(caught.value.hint)
        assert ("gguf-q4_k_m" in str(caught.value.hint)) == ("GGUF" in str(caught.value))
    assert not (tmp_path / "onnx").exists()


def test_the_command_line_reads_such_a_folder(shipped: Callable[..., packers.Folder], tmp_path: Path) -> None:
    folder = shipped(packers.gptq, order=True).path
    inspected = json.loads(cli("inspect", folder, "--json").stdout)
    assert inspected["quantized"] == {"w4-g32-asym": ALL}
    validated = cli("validate", folder, "--reference", folder, "--tokens", "300", "--json")
    assert validated.returncode == 0, validated.stderr
    assert abs(json.loads(validated.stdout)["results"][0]["kl_mean"]) < 1e-6
    again = cli("quantize", folder, "--recipe", "rtn-w4a16-g128", "--output", tmp_path / "again")
    assert again.returncode == InputError.exit_code
    assert "is quantized already" in again.stderr
