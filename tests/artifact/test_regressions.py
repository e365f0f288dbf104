"""What goes wrong between a checkpoint and a device, done on purpose: each turns this project's own gate red.

The healthy artifact passes `.ci/gate.yaml`; the same limits fail every damaged one. All are held to them by the
pytest plugin, as a user's pipeline would, in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen3_export.core.source import open_source
from qwen3_export.core.tensorfile import write_tensors
from qwen3_export.ship.gguf import export_gguf
from tests.cli.helpers import call

GATE = Path(__file__).resolve().parents[2] / ".ci" / "gate.yaml"
TOKENS = ("--tokens", "4096", "--top-k", "0")
Tensors = dict[str, np.ndarray]


def copied(folder: Path, target: Path, change: Callable[[Tensors, dict[str, Any]], None] | None = None) -> Path:
    """A copy of a checkpoint folder whose tensors and configuration are changed."""
    shutil.copytree(folder, target)
    if change:
        config = json.loads((target / "config.json").read_text())
        for path in target.glob("*.safetensors"):
            tensors = load_file(path)
            change(tensors, config)
            write_tensors(path, tensors.items(), {"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))
    return target


def damaged_scales(tensors: Tensors, config: dict[str, Any]) -> None:
    name = "model.layers.3.mlp.down_proj.weight_scale"
    if name in tensors:
        tensors[name] = (tensors[name].astype(np.float32) * 1.5).astype(tensors[name].dtype)


def wrong_rope_base(tensors: Tensors, config: dict[str, Any]) -> None:
    scaling = config.get("rope_parameters") or config
    assert scaling["rope_theta"] == 1e6
    scaling["rope_theta"] = 10000.0


def swapped_norms(tensors: Tensors, config: dict[str, Any]) -> None:
    for layer in range(config["num_hidden_layers"]):
        q, k = (f"model.layers.{layer}.self_attn.{name}_norm.weight" for name in "qk")
        tensors[q], tensors[k] = tensors[k], tensors[q]


def untied_head(tensors: Tensors, config: dict[str, Any]) -> None:
    """The head keeps what the embedding was before it was trained on."""
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    before = embedding * (1 + 0.05 * np.random.default_rng(0).standard_normal(embedding.shape))
    tensors["lm_head.weight"] = before.astype(ml_dtypes.bfloat16)
    config["tie_word_embeddings"] = False


def changed_template(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    assert "assistant" in values["chat_template"]
    values["chat_template"] = values["chat_template"].replace("assistant", "model")
    path.write_text(json.dumps(values))
    return folder


def gguf(folder: Path, kind: str | None = "q8_0") -> Path:
    export_gguf(open_source(str(folder)), folder.with_suffix(".gguf"), kind)
    return folder.with_suffix(".gguf")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, quantized: Callable[[str], Path]) -> dict[str, Path]:
    """The embedded model in 8 bits, healthy and damaged in every way, by what was done."""
    base = tmp_path_factory.mktemp("regressions")
    source = Path(open_source("reference-model").folder)
    made = {"healthy": gguf(copied(source, base / "healthy"))}
    made["healthy 8-bit codes"] = gguf(copied(quantized("rtn-w8a16"), base / "codes"), None)
    made["a layer's scales damaged"] = gguf(copied(quantized("rtn-w8a16"), base / "scales", damaged_scales), None)
    made["wrong RoPE base"] = gguf(copied(source, base / "rope", wrong_rope_base))
    made["swapped q/k norms"] = gguf(copied(source, base / "norms", swapped_norms))
    made["a tied head untied and left behind"] = gguf(copied(source, base / "head", untied_head))
    made["changed chat template"] = gguf(changed_template(copied(source, base / "template")))
    lost = copied(source, base / "generation")
    (lost / "generation_config.json").unlink()
    made["lost generation_config"] = gguf(lost)
    return made


@pytest.fixture(scope="module")
def outcomes(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What the plugin says of each artifact: its failure's message, None for a pass."""
    folder = tmp_path_factory.mktemp("plugin")
    reference = folder / "original.safetensors"
    assert call("reference", "reference-model", "--output", reference, *TOKENS).code == 0
    return run_plugin(folder, reference, artifacts, f"gate={str(GATE)!r}")


def run_plugin(folder: Path, reference: Path, artifacts: dict[str, Path], limits: str) -> dict[str, str | None]:
    """A user's test file and a user's command line."""
    paths = {name: str(path) for name, path in artifacts.items()}
    (folder / "test_release.py").write_text(
        "import pytest\n\n"
        f"ARTIFACTS = {paths!r}\n\n\n"
        "@pytest.mark.parametrize('name', ARTIFACTS)\n"
        "def test_release(name, assert_no_drift):\n"
        f"    result = assert_no_drift(ARTIFACTS[name], {limits})\n"
        "    assert result['gate']['passed']\n"
    )
    options = ("-q", "-p", "qwen3_export.pytest_plugin", "--qwen3-reference", str(reference), "--qwen3-threads", "1")
    command = [sys.executable, "-m", "pytest", *options, "--junitxml=report.xml", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, str | None] = {}
    for name, case in zip(paths, ElementTree.parse(folder / "report.xml").iter("testcase"), strict=True):
        assert case.find("error") is None, done.stdout
        failure = case.find("failure")
        found[name] = None if failure is None else str(failure.text)
    return found


@pytest.mark.parametrize("name", ["healthy", "healthy 8-bit codes"])
def test_a_healthy_artifact_passes_the_gate_of_this_projects_ci(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("a layer's scales damaged", "max_kl is "),
        ("wrong RoPE base", "max_kl is "),
        ("swapped q/k norms", "max_kl is "),
        ("a tied head untied and left behind", "max_kl is "),
        ("a tied head untied and left behind", "max_bytes is "),
        ("changed chat template", "max_changed_sidecars is 1"),
        ("lost generation_config", "max_changed_sidecars is 1"),
    ],
)
def test_a_seeded_regression_turns_it_red(name: str, limit: str, outcomes: dict[str, str | None]) -> None:
    assert limit in (outcomes[name] or "")


def test_a_changed_sidecar_changes_nothing_else(outcomes: dict[str, str | None]) -> None:
    for name in ("changed chat template", "lost generation_config"):
        assert "max_kl" not in (outcomes[name] or "")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's MLPs as experts that differ, behind random routers."""
    folder = tmp_path_factory.mktemp("mixture") / "healthy"

    def upcycle(tensors: Tensors, config: dict[str, Any]) -> None:
        random, experts = np.random.default_rng(1), 4
        for layer in range(config["num_hidden_layers"]):
            mlp = f"model.layers.{layer}.mlp"
            for name in ("gate_proj", "up_proj", "down_proj"):
                dense = tensors.pop(f"{mlp}.{name}.weight").astype(np.float32)
                for expert in range(experts):
                    own = dense * (1 + 0.3 * random.standard_normal(dense.shape))
                    tensors[f"{mlp}.experts.{expert}.{name}.weight"] = own.astype(ml_dtypes.bfloat16)
            router = random.standard_normal((experts, config["hidden_size"])) / 4
            tensors[f"{mlp}.gate.weight"] = router.astype(ml_dtypes.bfloat16)
        config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts}
        config |= {"num_experts_per_tok": 2, "moe_intermediate_size": config["intermediate_size"]}
        config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}

    return copied(Path(open_source("reference-model").folder), folder, upcycle)


def quantized_router(tensors: Tensors, config: dict[str, Any]) -> None:
    """Symmetric 4 bits in groups of 32, as the linears are quantized."""
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        groups = tensors[name].astype(np.float32).reshape(-1, 32)
        scales = np.abs(groups).max(-1, keepdims=True) / 7
        rounded = (np.rint(groups / scales) * scales).reshape(tensors[name].shape)
        tensors[name] = rounded.astype(ml_dtypes.bfloat16)


def test_a_quantized_router_turns_it_red(mixture: Path, tmp_path: Path) -> None:
    reference = tmp_path / "original.safetensors"
    assert call("reference", mixture, "--output", reference, "--tokens", "2048", "--top-k", "0").code == 0
    artifacts = {
        "healthy": gguf(copied(mixture, tmp_path / "healthy"), "bf16"),
        "router": gguf(copied(mixture, tmp_path / "router", quantized_router), "bf16"),
    }
    outcomes = run_plugin(tmp_path, reference, artifacts, "max_kl=0.001, min_top1=0.97, max_changed_sidecars=0")
    assert outcomes["healthy"] is None
    assert "max_kl is " in (outcomes["router"] or "")


def test_without_a_reference_the_plugin_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(assert_no_drift):\n    assert_no_drift('m', max_kl=1)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "qwen3_export.pytest_plugin", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "--qwen3-reference FILE is needed" in done.stdout
