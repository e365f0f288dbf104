"""`gguf` where a row is too narrow for the wanted type: who has which type instead is told, by name where asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.gguf_header import TYPES, read_gguf_header
from qwen3_export.core.gguf_types import FILE_TYPES, PLAIN, block_length, fitting_type, wanted_types
from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.resources import resource
from qwen3_export.core.scheme import GGML_TYPES
from tests.cli.helpers import Outcome, call, write_text_model
from tests.conftest import random_tensors, tiny_config, tiny_moe_config, write_checkpoint

# Rows of 160 take blocks of 32, rows of 48 none; `model` of the other tests has 128 and 256.
SIZES = {
    "rows of 48": {"hidden_size": 48, "intermediate_size": 96, "head_dim": 16},
    "rows of 160": {"hidden_size": 160, "intermediate_size": 256, "head_dim": 32},
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("narrow")
    return {name: write_text_model(base / name, **sizes) for name, sizes in SIZES.items()}


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_gguf_header(path).tensors}


def warnings_of(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("warning: ")]


def groups(tensors: list[dict[str, Any]]) -> set[str]:
    """What must be said of them, counted here."""
    counts = Counter((item["type"], item["wanted"], item["row_width"], item["block_size"]) for item in tensors)
    return {f"{n} {kind} instead of {w} (rows of {row}, blocks of {b})" for (kind, w, row, b), n in counts.items()}


def test_a_file_of_blocks_of_32_in_place_of_256(narrow: dict[str, Path], tmp_path: Path) -> None:
    command = ("gguf", narrow["rows of 160"], "--type", "q4_k_m")
    values = call(*command, "--output", tmp_path / "a.gguf", "--json").json
    found, stored = values["fallbacks"], types_of(tmp_path / "a.gguf")
    # Rows of 256 have what was wanted; llama.cpp's own choice of q6_k for attn_v is none of these.
    assert {name for name, kind in stored.items() if kind != "f32"} - {item["name"] for item in found} == {
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down.weight",
    }
    for item in found:
        assert stored[item["name"]] == item["type"] == {"q4_k": "q5_0", "q6_k": "q8_0"}[item["wanted"]]
        assert (item["block_size"], item["asked_for"]) == (256, False)
        assert item["row_width"] == (128 if "attn_output" in item["name"] else 160)
    assert {item["wanted"] for item in found if item["name"] in ("token_embd.weight", "blk.1.attn_v.weight")} == {
        "q6_k"
    }
    assert values["left_in_16_bits"] == 0
    outcome = call(*command, "--output", tmp_path / "b.gguf")
    (warning,) = warnings_of(outcome)
    assert f"{len(found)} tensors get another type than wanted" in warning
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("other types"))
    assert set(line.removeprefix("other types").strip().split("; ")) == groups(found)
    assert line.removeprefix("other types").strip() in warning
    assert "16 bits" not in outcome.out + outcome.err


def test_a_file_that_stays_in_16_bits(narrow: dict[str, Path], tmp_path: Path) -> None:
    command = ("gguf", narrow["rows of 48"], "--type", "q4_k_m")
    values = call(*command, "--output", tmp_path / "a.gguf", "--json").json
    sizes = {t.name: t.shape for t in read_gguf_header(tmp_path / "a.gguf").tensors if t.type != "f32"}
    left = {item["name"] for item in values["fallbacks"] if item["type"] == "f16"}
    assert "token_embd.weight" in left
    elements = {name: shape[0] * shape[1] for name, shape in sizes.items()}
    share = sum(elements[name] for name in left) / sum(elements.values())
    assert values["left_in_16_bits"] == pytest.approx(share)
    assert share > 0.9
    outcome = call(*command, "--output", tmp_path / "b.gguf")
    (warning,) = warnings_of(outcome)
    told = f"{share:.0%} of the weights to be quantized stay in 16 bits: no type of llama.cpp divides rows of 48"
    assert any(line.startswith("in 16 bits ") and told in line for line in outcome.out.splitlines())
    assert told in warning
    assert "group_size 16" in warning
    assert not warnings_of(call(*command, "--output", tmp_path / "c.gguf", "--quiet"))


def test_the_remedy_for_rows_of_48_is_one(narrow: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: g16\nmethod: rtn\nrules:\n  - match: '*'\n    scheme: {num_bits: 4, group_size: 16}\n")
    command = ("onnx", narrow["rows of 48"], "--recipe", recipe, "--output", tmp_path / "onnx", "--json")
    assert call(*command).json["linear_bits_per_weight"] < 8


def test_a_type_that_was_asked_for_is_named_with_its_tensors(narrow: dict[str, Path], tmp_path: Path) -> None:
    command = ("gguf", narrow["rows of 160"], "--type", "q8_0")
    one = call(*command, "--tensor-type", r"blk\.1\.attn_q=q4_k", "--output", tmp_path / "one.gguf", "--json")
    assert one.json["fallbacks"] == [
        {
            "name": "blk.1.attn_q.weight",
            "wanted": "q4_k",
            "type": "q5_0",
            "row_width": 160,
            "block_size": 256,
            "asked_for": True,
        }
    ]
    (warning,) = warnings_of(one)
    assert warning == (
        "warning: 1 tensor gets another type than wanted, whose blocks do not divide a row: 1 q5_0 instead of q4_k "
        "(rows of 160, blocks of 256); asked for, and not possible: blk.1.attn_q.weight"
    )
    many = call(*command, "--tensor-type", "attn_[qkv]=q6_k", "--output", tmp_path / "many.gguf")
    assert "blk.0.attn_q.weight, blk.0.attn_k.weight, blk.0.attn_v.weight and 3 others" in warnings_of(many)[0]
    fits = call(*command, "--tensor-type", "ffn_down=q4_k", "--output", tmp_path / "fits.gguf")
    assert not warnings_of(fits)
    assert "other types" not in fits.out
    # The tied head's type goes to the embedding.
    head = call(*command, "--output-type", "q6_k", "--tensor-type", "attn_q=q4_0", "--output", tmp_path / "head.gguf")
    assert (
        "1 q8_0 instead of q6_k (rows of 160, blocks of 256); asked for, and not possible: token_embd.weight"
        in (warnings_of(head)[0])
    )


def test_codes_keep_silent_and_rounded_again_they_do_not(narrow: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    assert call("quantize", narrow["rows of 160"], "--recipe", "rtn-w4a16-g32", "--output", folder).code == 0
    moved = call("gguf", folder, "--output", tmp_path / "moved.gguf", "--json")
    assert (moved.json["fallbacks"], warnings_of(moved)) == ([], [])
    again = ("gguf", folder, "--type", "q4_k_m", "--allow-requantize", "--output", tmp_path / "again.gguf", "--json")
    found = {item["name"]: (item["type"], item["wanted"]) for item in call(*again).json["fallbacks"]}
    assert found["blk.0.attn_q.weight"] == ("q5_0", "q4_k")
    assert "blk.0.ffn_down.weight" not in found


def test_a_recipe_of_a_mix_says_so_before_it_runs(narrow: dict[str, Path], model: Path, tmp_path: Path) -> None:
    recipe = ("--recipe", "gguf-q4_k_m", "--samples", "2", "--sequence-length", "16")
    outcome = call("gguf", narrow["rows of 48"], *recipe, "--output", tmp_path / "a.gguf")
    assert outcome.code == 0, outcome.err
    (warning,) = warnings_of(outcome)
    plain = call("gguf", narrow["rows of 48"], "--type", "q4_k_m", "--output", tmp_path / "b.gguf")
    assert [warning] == warnings_of(plain)
    rtn = ("quantize", model, "--recipe", "rtn-w4a16-g32", "--output", tmp_path / "rtn")
    assert not warnings_of(call(*rtn))


def test_plan_and_the_card_say_so_too(narrow: dict[str, Path], model: Path, tmp_path: Path) -> None:
    source = narrow["rows of 48"]
    made = call("gguf", source, "--type", "q4_k_m", "--card", "--output", tmp_path / "a.gguf")
    (warning,) = warnings_of(made)
    card = (tmp_path / "README.md").read_text()
    for title, told in (line.split("  ", 1) for line in made.out.splitlines() if line.startswith(("other", "in 16"))):
        assert f"| {title} | {told.strip()} |" in card
    assert card.count("| in 16 bits |") == 1
    plan = ("plan", source, "--recipe", "gguf-q4_k_m", "--no-time", "--format", "gguf")
    formats = call(*plan, "--json").json["formats"]
    assert {name for name, item in formats.items() if "16 bits" in item.get("note", "")} == {"ggml", "gguf"}
    assert warning == f"warning: {formats['gguf']['note']}"
    assert formats["gguf"]["note"] in " ".join(call(*plan).out.split())
    for fits in (("gguf-q4_k_m", resource("calibration") / "reference-model"), ("rtn-w4a16-g32", model)):
        plain = call("plan", fits[1], "--recipe", fits[0], "--no-time", "--json").json["formats"]
        assert "note" not in plain["gguf"]


def test_experts_of_a_stack_are_one_tensor(tmp_path: Path) -> None:
    config = tiny_moe_config(hidden_size=256, moe_intermediate_size=32, head_dim=64, num_experts=4, vocab_size=8192)
    write_text_model(folder := tmp_path / "moe")
    write_checkpoint(folder, config, random_tensors(parse_config(config, "test")))
    values = call("gguf", folder, "--type", "q4_k_s", "--output", tmp_path / "moe.gguf", "--json").json
    assert Counter(item["name"].partition("_exps")[1] for item in values["fallbacks"]) == {"_exps": 2}
    assert {item["row_width"] for item in values["fallbacks"]} == {32}


def test_what_stays_in_16_bits_fits_no_type_at_all() -> None:
    """So there is no other type to advise."""
    for name in GGML_TYPES:
        for width in range(16, 1041, 16):
            if fitting_type(name, width) in PLAIN:
                assert all(width % length for kind, length, _ in TYPES.values() if length > 1), (name, width)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_widths_that_every_block_divides_have_the_wanted_types(name: str) -> None:
    config = parse_config(tiny_config(hidden_size=256, intermediate_size=512, head_dim=64), "test")
    shapes = config.all_matrices()
    assert all(shapes[m][1] % block_length(kind) == 0 for m, kind in wanted_types(config, name).items())


def test_a_type_for_experts_says_that_a_dense_model_has_none(model: Path, tmp_path: Path) -> None:
    told = call("gguf", model, "--type", "mxfp4_moe", "--output", tmp_path / "a.gguf")
    assert told.code == 0
    assert "mxfp4_moe is a type for experts, of which this model has none" in told.err
    assert "experts" not in call("gguf", model, "--type", "mxfp4", "--output", tmp_path / "b.gguf").err
