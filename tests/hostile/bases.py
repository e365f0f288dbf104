"""Sound inputs for the generators to damage: tiny models, an artifact of each kind."""

from __future__ import annotations

from pathlib import Path

from tests.cli.helpers import write_text_model
from tests.conftest import tiny_moe_config
from tests.hostile.child import run_child

SHORT = ("--samples", "4", "--sequence-length", "32")
_MOE = {key: tiny_moe_config()[key] for key in set(tiny_moe_config()) - {"hidden_size", "vocab_size"}}


def make_bases(folder: Path) -> Path:
    """Make them once, through the command line itself."""
    folder.mkdir(parents=True, exist_ok=True)
    model, moe = folder / "model", folder / "moe"
    write_text_model(model, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    write_text_model(moe, **{**_MOE, "moe_intermediate_size": 64, "intermediate_size": 128, "num_experts": 4})
    commands = [
        ("quantize", model, "--recipe", "rtn-w4a16-g32", "--output", folder / "quantized"),
        ("onnx", folder / "quantized", "--output", folder / "onnx"),
        ("gguf", folder / "quantized", "--output", folder / "model.gguf"),
        ("reference", model, "--output", folder / "reference.safetensors", "--tokens", "64", "--window", "32"),
        ("calibrate", model, "--output", folder / "matrix.gguf", *SHORT),
        ("validate", folder / "onnx", "--reference", folder / "reference.safetensors", "--report", folder / "report"),
    ]
    for command in commands:
        outcome = run_child(command, folder)
        assert outcome.code == 0, (command, outcome.err)
    return folder
