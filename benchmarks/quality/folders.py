"""Any tool's output folder as an fp32 transformers model: one forward pass for all.

Stored weights are dequantized in fp32. Activations that a compressed-tensors scheme quantizes are quantized in the
forward pass too, by that library's own code. Experts become separate linears, since hooks cannot reach into the one
stacked parameter that transformers keeps them in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

State = dict[str, Tensor]


class Experts(nn.ModuleList):
    """transformers' stacked experts as separate MLPs; routing comes as an argument."""

    def __init__(self, count: int, hidden: int, inner: int) -> None:
        super().__init__(Expert(hidden, inner) for _ in range(count))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, rank = torch.where(chosen == index)
            if len(token):
                result.index_add_(0, token, (expert(hidden[token]) * weights[token, rank, None]).to(result.dtype))
        return result


class Expert(nn.Module):
    """down(silu(gate) · up)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def load(folder: Path) -> PreTrainedModel:
    """The model of a 16-bit or quantized folder, ready for fp32 logits."""
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
    config.dtype = torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "experts"):
            module.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
    state = stored(folder)
    if quantization is not None:
        state = READERS[quantization["quant_method"]](model, state, quantization)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)
    if set(missing) - tied or unexpected:
        raise ValueError(f"{folder}: missing {sorted(missing)[:4]}, unexpected {sorted(unexpected)[:4]}")
    model.tie_weights()
    return model.eval()


def stored(folder: Path) -> State:
    """Every tensor of the folder's shards."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def compressed_tensors(model: nn.Module, state: State, values: dict) -> State:
    """Decompress module by module and hook the activations."""
    given = {key: values[key] for key in ("config_groups", "ignore", "format", "quant_method") if key in values}
    config = QuantizationConfig.model_validate(given)
    for scheme in config.config_groups.values():
        kind = BaseCompressor.load_from_registry(scheme.format or config.format)
        for name, module in match_named_modules(model, scheme.targets, config.ignore):
            mine = {key.removeprefix(f"{name}."): state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
            if "weight_scale" not in mine:
                raise ValueError(f"{name}: in the scheme {scheme.targets}, but without a scale")
            if mine["weight_scale"].dtype in (torch.bfloat16, torch.float16):
                mine["weight_scale"] = mine["weight_scale"].float()
            state[f"{name}.weight"] = kind.decompress(mine, scheme)["weight"]
            if scheme.input_activations is not None:
                module.register_forward_pre_hook(activation_hook(scheme, mine))
    return state


def activation_hook(scheme: QuantizationScheme, mine: State) -> Callable:
    """A hook that rounds a linear's input; `mine` holds a static scheme's scale."""
    args = scheme.input_activations
    static = mine["input_scale"].float() if args.dynamic is False else None

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        # One scale per token needs a batch dimension: compressed-tensors keeps the first two.
        value = inputs[0] if inputs[0].ndim == 3 else inputs[0][None]
        scale, zero = (static, None) if static is not None else compute_dynamic_scales_and_zp(value, args, module)
        return (fake_quantize(value, scale, zero, args).reshape(inputs[0].shape),)

    return hook


def fp8(model: nn.Module, state: State, values: dict) -> State:
    """The official FP8 releases' layout: E4M3, scales per block, inputs rounded in groups."""
    height, width = values["weight_block_size"]
    scheme = preset_name_to_scheme("FP8_BLOCK", targets=["Linear"])
    result = dict(state)
    for name in modules(state, "weight_scale_inv"):
        codes = state[f"{name}.weight"].float()
        scales = state[f"{name}.weight_scale_inv"].float().repeat_interleave(height, 0).repeat_interleave(width, 1)
        replace(result, name, codes * scales[: codes.shape[0], : codes.shape[1]])
        model.get_submodule(name).register_forward_pre_hook(activation_hook(scheme, {}))
    return result


def gptq(model: nn.Module, state: State, values: dict) -> State:
    """GPTQ's layout.

    A word of `qweight` holds 32 / bits inputs of one output, a word of `qzeros` as many outputs of one group.
    """
    bits, result = values["bits"], dict(state)
    # Version 1 of the layout stores zero points minus one.
    shift = 0 if values.get("checkpoint_format") == "gptq_v2" else 1
    for name in modules(state, "qweight"):
        codes = unpack(state[f"{name}.qweight"].T, bits).T
        zeros = (unpack(state[f"{name}.qzeros"], bits) + shift) & ((1 << bits) - 1)
        scales = state[f"{name}.scales"].float()
        group = state[f"{name}.g_idx"].long() if f"{name}.g_idx" in state else None
        group = torch.arange(len(codes)) // (len(codes) // len(scales)) if group is None else group
        replace(result, name, ((codes - zeros[group]) * scales[group]).T)
    return result


def awq(model: nn.Module, state: State, values: dict) -> State:
    """AWQ's layout: a word of `qweight` holds eight outputs of one input, interleaved."""
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    result = dict(state)
    for name in modules(state, "qweight"):
        codes, zeros = (
            torch.unflatten(unpack(state[f"{name}.{key}"], values["bits"]), -1, (-1, 8))[..., order].flatten(-2)
            for key in ("qweight", "qzeros")
        )
        scales = state[f"{name}.scales"].float()
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
        replace(result, name, ((codes - zeros[group]) * scales[group]).T)
    return result


READERS = {"compressed-tensors": compressed_tensors, "fp8": fp8, "gptq": gptq, "awq": awq}


def modules(state: State, suffix: str) -> Iterator[str]:
    return (key.removesuffix(f".{suffix}") for key in state if key.endswith(f".{suffix}"))


def replace(state: State, name: str, weight: Tensor) -> None:
    for key in [key for key in state if key.startswith(f"{name}.")]:
        del state[key]
    state[f"{name}.weight"] = weight


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 words `[rows, n]` → codes `[rows, 32 n / bits]`, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2).long()


def quantization_of(folder: Path) -> dict:
    """The folder's quantization_config, empty for a 16-bit model."""
    return json.loads((folder / "config.json").read_text()).get("quantization_config", {})
