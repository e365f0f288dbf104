"""Small trained models of other shapes, distilled from the reference model.

A student starts from the reference model's weights, widened or cut into experts, and is trained to give its
distributions on the bundled calibration text: a few minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.quality.folders import Expert, Experts, load
from benchmarks.quality.sidecars import copy_sidecars
from qwen3_export.core.source import locate
from qwen3_export.model.workers import has_bf16
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import calibration_samples
from qwen3_export.text.tokenizer import ModelTokenizer

LENGTH, BATCH = 256, 8
STEPS = {"small": 150, "moe": 80}
RATE, BALANCE, NOISE = 1e-3, 0.01, 0.1
KEPT_LAYERS = (0, 1, 3, 5)
EXPERTS, CHOSEN, EXPERT_WIDTH = 8, 2, 384
Kind = TypeVar("Kind", bound=nn.Module)


def make(name: str, folder: Path) -> None:
    """Initialise, train and write one student, with a fixed seed."""
    torch.manual_seed(0)
    teacher = load(locate("reference-model"))
    assert isinstance(teacher, Qwen3ForCausalLM)
    student = {"small": widened, "moe": with_experts}[name](teacher)
    samples = calibration_samples(
        ModelTokenizer(locate("reference-model")), load_documents("bundled"), 10_000, LENGTH, 0
    )
    ids = torch.stack([torch.from_numpy(row).long() for row in samples.ids])
    train(student, teacher, ids, STEPS[name])
    write(student, folder)


def write(student: PreTrainedModel, folder: Path) -> None:
    """A Hugging Face folder in bf16, one tensor per expert."""
    config = student.config.to_dict() | {"dtype": "bfloat16", "architectures": [type(student).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tied = {"lm_head.weight"} if student.config.tie_word_embeddings else set()
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in student.state_dict().items() if k not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    copy_sidecars(folder)


def train(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, steps: int) -> None:
    """AdamW with a cosine schedule on KL(teacher ‖ student), experts kept in balance."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    order = torch.cat([torch.randperm(len(ids)) for _ in range(steps * BATCH // len(ids) + 1)])
    routed: list[Tensor] = []
    routers = [block.gate for block in modules_of(student, Qwen3MoeSparseMoeBlock)]
    hooks = [m.register_forward_hook(lambda _m, _i, out: routed.append(out[0])) for m in routers]
    for step in range(steps):
        batch = ids[order[step * BATCH : (step + 1) * BATCH]]
        routed.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, has_bf16()):
            wanted = teacher(batch).logits.float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16, has_bf16()):
            given = student(batch, use_cache=False).logits
        loss = (wanted.exp() * (wanted - given.float().log_softmax(-1))).sum(-1).mean()
        (loss + BALANCE * imbalance(routed)).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"distil: step {step}, KL {loss.item():.4f}", file=sys.stderr, flush=True)
    for hook in hooks:
        hook.remove()


def modules_of(model: nn.Module, kind: type[Kind]) -> list[Kind]:
    """The modules of one class, in the model's order."""
    return [module for module in model.modules() if isinstance(module, kind)]


def imbalance(routed: list[Tensor]) -> Tensor:
    """The load-balancing loss of Switch Transformers: experts × share of tokens · mean probability."""
    total = torch.zeros(())
    for logits in routed:
        probabilities = logits.float().softmax(-1)
        share = functional.one_hot(probabilities.topk(CHOSEN).indices, EXPERTS).float().mean((0, 1))
        total = total + EXPERTS * (share * probabilities.mean(0)).sum()
    return total


def widened(teacher: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Hidden 384, four layers, four key/value heads, intermediate 896, a head of its own."""
    old = teacher.config
    assert old.num_key_value_heads is not None
    config = Qwen3Config(
        **{**shared(old), "hidden_size": 384, "num_hidden_layers": len(KEPT_LAYERS), "intermediate_size": 896},
        num_key_value_heads=old.num_attention_heads,
        tie_word_embeddings=False,
    )
    student: Qwen3ForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state, source = student.state_dict(), teacher.state_dict()
    repeats = old.num_attention_heads // old.num_key_value_heads
    # The new channels, near zero at first, lower the root mean square that RMSNorm divides by.
    gain = (old.hidden_size / config.hidden_size) ** 0.5
    for name, target in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(KEPT_LAYERS[int(parts[2])])
        old_weight = source[".".join(parts)]
        if parts[-2] in ("k_proj", "v_proj"):
            old_weight = old_weight.unflatten(0, (-1, old.head_dim)).repeat_interleave(repeats, 0).flatten(0, 1)
        if parts[-2].endswith("norm") and len(target) == config.hidden_size:
            old_weight = old_weight * gain
        elif target.ndim == 2:
            target.normal_(0, NOISE * float(old_weight.std()))
        target[tuple(slice(size) for size in old_weight.shape)] = old_weight
    student.load_state_dict(state)
    return student


def with_experts(teacher: Qwen3ForCausalLM) -> Qwen3MoeForCausalLM:
    """Every MLP as eight experts of half its width, two at a time."""
    old = teacher.config
    assert old.num_key_value_heads is not None
    config = Qwen3MoeConfig(
        **shared(old),
        num_key_value_heads=old.num_key_value_heads,
        tie_word_embeddings=True,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_WIDTH,
        norm_topk_prob=True,
        decoder_sparse_step=1,
    )
    student: Qwen3MoeForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for block, dense in zip(modules_of(student, Qwen3MoeSparseMoeBlock), modules_of(teacher, Qwen3MLP), strict=True):
        block.add_module("experts", Experts(EXPERTS, old.hidden_size, EXPERT_WIDTH))
        nn.init.normal_(block.gate.weight, std=old.hidden_size**-0.5)
        for expert in modules_of(block, Expert):
            cut(expert, dense)
    common = {k: v for k, v in teacher.state_dict().items() if ".mlp." not in k}
    student.load_state_dict(common, strict=False)
    student.tie_weights()
    return student


@torch.no_grad()
def cut(expert: Expert, dense: Qwen3MLP) -> None:
    """An expert from a random half of the channels, plus noise.

    Its outputs are doubled, since the mean of two experts is taken.
    """
    kept = torch.randperm(dense.gate_proj.out_features)[:EXPERT_WIDTH]
    expert.gate_proj.weight.copy_(noisy(dense.gate_proj.weight[kept]))
    expert.up_proj.weight.copy_(noisy(dense.up_proj.weight[kept]))
    expert.down_proj.weight.copy_(noisy(2 * dense.down_proj.weight[:, kept]))


def noisy(weight: Tensor) -> Tensor:
    return weight + NOISE * weight.std() * torch.randn_like(weight)


def shared(old: Qwen3Config) -> dict:
    """Configuration values that every student shares with the reference model."""
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    other = ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "eos_token_id", "pad_token_id")
    return {key: getattr(old, key) for key in (*shape, *other)}
