"""Quantized folders in transformers and compressed-tensors: the same codes, weights and logits.

A symmetric folder is loaded in two ways. As it is, compressed-tensors multiplies codes by scales in the
type that was asked for: in fp32 the weights are ours bit for bit. With `dequantize=True` it multiplies
in the scales' bf16: the weights are ours rounded to bf16. An asymmetric folder loads in the second
way; in the first, transformers 5.23 expects zero points that are not packed, also from its own folders.
Routed experts always take the second way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoConfig, CompressedTensorsConfig

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.recipe import Recipe
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.model.table import to_torch
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.conftest import tiny_config, tiny_moe_config, write_checkpoint
from tests.reference.models import assert_same_logits, dequantized, load_theirs

DENSE = tiny_config(hidden_size=128, intermediate_size=256, rope_theta=1e6)
SCHEMES: dict[str, dict[str, Any]] = {
    "w4 g128": {"num_bits": 4, "group_size": 128},
    "w4 g32": {"num_bits": 4, "group_size": 32},
    "w4 channel": {"num_bits": 4, "strategy": "channel"},
    "w8 g32": {"num_bits": 8, "group_size": 32},
    "w8 channel": {"num_bits": 8, "strategy": "channel"},
    "w2 g32": {"num_bits": 2, "group_size": 32},
    "w4 g32 asymmetric": {"num_bits": 4, "group_size": 32, "symmetric": False},
    "w4 channel asymmetric": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "w8 g32 asymmetric": {"num_bits": 8, "group_size": 32, "symmetric": False},
}
SYMMETRIC = [name for name in SCHEMES if "asymmetric" not in name]
MIXED = [
    {"match": "*.0.mlp.*", "scheme": SCHEMES["w8 g32"]},
    {"match": "*.o_proj", "scheme": None},
    {"match": "*", "scheme": SCHEMES["w4 g32"]},
]
Make = Callable[..., Path]
# Said of every folder that is loaded with `dequantize=True`.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(name, rules=…, config=…)` → a folder that was rounded by these rules, made once."""
    base = tmp_path_factory.mktemp("quantized")

    def folder(name: str, rules: list[dict[str, Any]] | None = None, config: dict[str, Any] | None = None) -> Path:
        output = base / name
        if not output.exists():
            source = write_checkpoint(base / f"{name} source", config or DENSE)
            chosen = rules or [{"match": "*", "scheme": SCHEMES[name]}]
            recipe = Recipe.from_dict({"name": name, "method": "rtn", "rules": chosen}, "test")
            quantize(open_checkpoint(source), recipe, output, QuantizeSettings())
        return output

    return folder


def dense_copy(folder: Path, rounded: str) -> Path:
    """The dequantized model as a plain fp32 folder; modules with `rounded` in their name are rounded to bf16."""
    checkpoint, weights = open_checkpoint(folder), dequantized(folder)
    plain = {
        n: checkpoint.read(n).astype(np.float32) for n in checkpoint.config.tensor_shapes() if n in checkpoint.files
    }
    for module, weight in weights.items():
        exact = weight.astype(ml_dtypes.bfloat16).astype(np.float32) if rounded in module else weight
        plain[f"{module}.weight"] = exact
    config = {key: value for key, value in checkpoint.raw_config.items() if key != "quantization_config"}
    return write_checkpoint(folder.with_name(f"{folder.name} rounded {len(rounded)}"), config, plain)


def in_bf16() -> dict[str, Any]:
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def their_weights(model: Any, modules: list[str]) -> dict[str, np.ndarray]:
    # Packed modules are unpacked by the first forward pass.
    model(torch.zeros(1, 1, dtype=torch.int64))
    return {module: model.get_submodule(module).weight.detach().numpy() for module in modules}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_symmetric_folder_gives_our_weights_and_logits(make: Make, name: str) -> None:
    folder = make(name)
    wanted = dequantized(folder)
    assert len(wanted) == 14
    found = their_weights(load_theirs(folder), list(wanted))
    for module, weight in wanted.items():
        np.testing.assert_array_equal(found[module], weight)
    assert_same_logits(folder, folder)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_folder_gives_our_weights_in_bf16_and_their_logits(make: Make, name: str) -> None:
    folder = make(name)
    wanted = dequantized(folder)
    found = their_weights(load_theirs(folder, **in_bf16()), list(wanted))
    for module, weight in wanted.items():
        np.testing.assert_array_equal(found[module], weight.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert_same_logits(dense_copy(folder, ""), folder, **in_bf16())


def test_a_folder_of_several_schemes_gives_our_logits(make: Make) -> None:
    folder = make("mixed", MIXED)
    assert len({scheme.label for scheme in open_checkpoint(folder).schemes.values()}) == 2
    assert_same_logits(folder, folder)


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0]}], ids=["sparse", "partly-dense"])
def test_a_mixture_gives_our_logits_with_its_experts_in_bf16(make: Make, changes: dict[str, Any]) -> None:
    rules = [{"match": "*", "scheme": {"num_bits": 4, "group_size": 16}}]
    folder = make(f"moe{len(changes)}", rules, tiny_moe_config(**changes))
    assert_same_logits(dense_copy(folder, ".experts."), folder)


def test_the_reference_model_gives_our_logits(quantized: Callable[[str], Path]) -> None:
    folder = quantized("rtn-w4a16-g128")
    assert_same_logits(folder, folder)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_unpacks_exactly_our_codes_and_zero_points(make: Make, name: str) -> None:
    checkpoint = open_checkpoint(make(name))
    for module, scheme in checkpoint.schemes.items():
        tensor = checkpoint.linear(module)
        assert isinstance(tensor, QuantizedTensor)
        words = torch.from_numpy(checkpoint.read(f"{module}.weight_packed"))
        signed = unpack_from_int32(words, scheme.num_bits, torch.Size(tensor.shape)).numpy()
        np.testing.assert_array_equal(signed.astype(np.int16) + scheme.midpoint, tensor.codes)
        assert torch.equal(pack_to_int32(torch.from_numpy(signed), scheme.num_bits), words)
        assert checkpoint.read(f"{module}.weight_shape").tolist() == list(tensor.shape)
        if tensor.zeros is None:
            assert f"{module}.weight_zero_point" not in checkpoint.files
            continue
        packed = torch.from_numpy(checkpoint.read(f"{module}.weight_zero_point"))
        zeros = unpack_from_int32(packed, scheme.num_bits, torch.Size(tensor.zeros.shape), packed_dim=0).numpy()
        np.testing.assert_array_equal(zeros.astype(np.int16) + scheme.midpoint, tensor.zeros)
        assert torch.equal(pack_to_int32(torch.from_numpy(zeros.copy()), scheme.num_bits, packed_dim=0), packed)
        assert len(np.unique(tensor.zeros)) > 1


@pytest.mark.parametrize("name", SCHEMES)
def test_the_configuration_is_one_that_compressed_tensors_accepts(make: Make, name: str) -> None:
    config = open_checkpoint(make(name)).raw_config["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    (group,) = parsed.config_groups.values()
    wanted = SCHEMES[name]
    assert group.weights.num_bits == wanted["num_bits"]
    assert group.weights.symmetric is wanted.get("symmetric", True)
    assert group.weights.group_size == wanted.get("group_size")
    assert group.weights.strategy == wanted.get("strategy", "group")
    assert parsed.format == "pack-quantized"
    assert parsed.ignore == ["lm_head"]


def test_transformers_4_and_5_find_the_same_theta(make: Make) -> None:
    folder = make("w4 g32")
    raw = open_checkpoint(folder).raw_config
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 1e6
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 1e6
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"


UNTIED = {**DENSE, "tie_word_embeddings": False}
LINEARS = {"match": "*", "scheme": SCHEMES["w4 g32"]}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_an_untied_quantized_head_gives_our_logits(make: Make, name: str) -> None:
    folder = make(f"head {name}", [{"match": "lm_head", "scheme": SCHEMES[name]}, LINEARS], UNTIED)
    assert len(dequantized(folder)) == 15
    found = their_weights(load_theirs(folder), ["lm_head"])
    np.testing.assert_array_equal(found["lm_head"], dequantized(folder)["lm_head"])
    assert_same_logits(folder, folder)


def test_a_head_whose_inputs_are_rounded_gives_our_logits(make: Make) -> None:
    scheme = {"num_bits": 8, "strategy": "channel", "activations": "dynamic-token"}
    folder = make("head int8", [{"match": "lm_head", "scheme": scheme}, LINEARS], UNTIED)
    # Another order of a sum can move an input by a whole step.
    assert_same_logits(folder, folder, tolerance=0.1)


@pytest.mark.parametrize("config", [DENSE, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["w4 g32", "w8 g32", "w4 g32 asymmetric"])
def test_compressed_tensors_unpacks_a_quantized_embedding(make: Make, name: str, config: dict[str, Any]) -> None:
    from compressed_tensors.compressors import BaseCompressor

    embedding = "model.embed_tokens"
    folder = make(
        f"embedding {name} {config is DENSE}", [{"match": embedding, "scheme": SCHEMES[name]}, LINEARS], config
    )
    checkpoint = open_checkpoint(folder)
    parsed = QuantizationConfig.model_validate(checkpoint.raw_config["quantization_config"])
    (group,) = [g for g in parsed.config_groups.values() if embedding in g.targets]
    assert group.weights.num_bits == SCHEMES[name]["num_bits"]
    stored = {n.removeprefix(f"{embedding}."): to_torch(checkpoint.read(n)) for n in checkpoint.files if embedding in n}
    stored["weight_scale"] = stored["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found = compressor.decompress(stored, group)["weight"]
    np.testing.assert_array_equal(found.numpy(), dequantized(folder)[embedding])


@pytest.mark.parametrize("config", [DENSE, UNTIED], ids=["tied", "untied"])
def test_compressed_tensors_finds_every_matrix_that_the_configuration_names(make: Make, config: dict[str, Any]) -> None:
    from compressed_tensors.quantization import apply_quantization_config
    from transformers import AutoModelForCausalLM

    rules = [{"match": "model.embed_tokens", "scheme": SCHEMES["w4 g32"]}, LINEARS]
    folder = make(f"one scheme {config is DENSE}", rules, config)
    raw = open_checkpoint(folder).raw_config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "quantization_config": None}))
    apply_quantization_config(model, QuantizationConfig.model_validate(raw["quantization_config"]))
    found = {name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)}
    assert found == set(open_checkpoint(folder).schemes)


def test_transformers_cannot_load_a_quantized_embedding_yet(make: Make) -> None:
    """Said in the README; when this fails, that can go."""
    folder = make("embedding", [{"match": "model.embed_tokens", "scheme": SCHEMES["w8 g32"]}, LINEARS], UNTIED)
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
        load_theirs(folder)
