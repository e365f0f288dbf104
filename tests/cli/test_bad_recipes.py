"""Recipes that do not exist, are malformed or cannot be applied: exit 2 before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import call, names, refused

GOOD = "name: mine\nmethod: gptq\nrules:\n  - match: '*'\n    scheme: {num_bits: 4, group_size: 32}\n"

# The file's text, and what the error or its hint must say.
BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "no YAML": ("rules: [", ("recipe.yaml", "YAML")),
    "deeper than any recipe": ("[" * 5000, ("recipe.yaml", "YAML")),
    "code in it": ("!!python/object/apply:os.system ['id']", ("recipe.yaml", "YAML")),
    "empty": ("", ("recipe.yaml", "mapping")),
    "a list": ("- 1", ("recipe.yaml", "mapping")),
    "a key twice": (GOOD + "method: rtn\n", ("recipe.yaml", "'method' is given twice, in lines 2 and 6")),
    "no method": ("name: mine\nrules: []", ("method",)),
    "unknown method": (GOOD.replace("gptq", "gtpq"), ("gtpq", "gptq")),
    "method outside": (GOOD.replace("gptq", "../rtn"), ("../rtn",)),
    "unknown key": (GOOD + "bogus: 1\n", ("bogus",)),
    "unknown scheme key": (GOOD.replace("num_bits", "num_bit"), ("num_bit", "did you mean 'num_bits'")),
    "unknown option": (GOOD + "options: {perc_damp: 0.1}\n", ("perc_damp", "did you mean 'percdamp'")),
    "option of another kind": (GOOD + "options: {percdamp: much}\n", ("percdamp", "much")),
    "5 bits": (GOOD.replace("num_bits: 4", "num_bits: 5"), ("num_bits", "5")),
    "groups of 100": (GOOD.replace("32", "100"), ("model.layers.0.self_attn.q_proj", "100", "128")),
    "groups of -1": (GOOD.replace("32", "-1"), ("group_size", "-1")),
    "pattern without a match": (GOOD.replace("'*'", "'nothing'"), ("nothing", "model.layers.0.self_attn.q_proj")),
    "a negative damping": (GOOD + "options: {percdamp: -1.0}\n", ("percdamp", "-1.0")),
    "no samples": (GOOD + "calibration: {samples: 0}\n", ("samples", "0")),
    "longer than the model": (GOOD + "calibration: {sequence_length: 4096}\n", ("4096", "512")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    text, words = BAD[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refused(call("quantize", model, "--recipe", recipe, "--output", tmp_path / "out"), 2, *words)
    refused(call("onnx", model, "--recipe", recipe, "--output", tmp_path / "out"), 2, *words)
    assert names(tmp_path) == ["recipe.yaml"]


BLOCKS = "num_bits: 4, strategy: block, group_size: null, block_shape: [32, 32]"
# A recipe's scheme and layout, and the remedy.
UNFIT = {
    "one scale per matrix": (
        "num_bits: 4, strategy: tensor, group_size: null",
        "compressed-tensors",
        "strategy: group",
    ),
    "integers in blocks": (BLOCKS, "compressed-tensors", "strategy: group or channel"),
    "in another layout": (BLOCKS, "gptq", "strategy: group or channel"),
    "3 bits for AWQ": ("num_bits: 3, group_size: 32", "awq", "use layout compressed-tensors"),
    "ggml's blocks": ("type: kquant, ggml_type: q4_1", "compressed-tensors", "use layout ggml"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_remedy_that_holds_is_given_for_a_layout_that_does_not_fit(case: str, model: Path, tmp_path: Path) -> None:
    scheme, layout, remedy = UNFIT[case]
    recipe = tmp_path / "recipe.yaml"
    text = GOOD.replace("gptq", "rtn").replace("num_bits: 4, group_size: 32", scheme)
    recipe.write_text(f"{text}layout: {layout}\n")
    outcome = call("quantize", model, "--recipe", recipe, "--output", tmp_path / "out")
    refused(outcome, 2, f"does not fit the {layout} layout", f"hint: {remedy}" if "use" in remedy else remedy)
    repaired = {"use layout": text + f"layout: {remedy.removeprefix('use layout ')}\n"}
    recipe.write_text(repaired.get(remedy[:10], text.replace(scheme, "num_bits: 4, strategy: group, group_size: 32")))
    assert call("quantize", model, "--recipe", recipe, "--output", tmp_path / "out").code == 0


def test_unsolvable_recipe_leaves_nothing(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(GOOD + "options: {percdamp: 0.0}\n")
    # Fewer tokens than inputs, and no damping.
    few = ("--samples", "1", "--sequence-length", "16")
    refused(call("quantize", model, "--recipe", recipe, "--output", tmp_path / "out", *few), 2, "percdamp")
    assert names(tmp_path) == ["recipe.yaml"]


def test_unknown_name_proposes_near_ones(model: Path, tmp_path: Path) -> None:
    outcome = call("quantize", model, "--recipe", "gptq-w4a16-g12", "--output", tmp_path / "out")
    refused(outcome, 2, "gptq-w4a16-g12", "did you mean gptq-w4a16-g128")
    refused(call("recipes", "show", "gptq-w4a16-g12"), 2, "did you mean gptq-w4a16-g128")
    refused(call("recipes", "show", "nothing-like-it"), 2, "recipes list")
    assert names(tmp_path) == []


def test_codes_that_a_format_cannot_hold(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: c\nmethod: rtn\nrules: [{match: '*', scheme: {num_bits: 4, strategy: channel}}]\n")
    assert call("quantize", model, "--recipe", recipe, "--output", tmp_path / "quantized").code == 0
    before = names(tmp_path)
    refused(call("gguf", tmp_path / "quantized", "--output", tmp_path / "out.gguf"), 2, "q_proj", "multiple of 32")
    signed = "name: s\nmethod: rtn\nrules: [{match: '*', scheme: {num_bits: 4, group_size: 32, signed_scales: true}}]\n"
    recipe.write_text(signed)
    assert call("quantize", model, "--recipe", recipe, "--output", tmp_path / "quantized", "--force").code == 0
    refused(call("tensorrt", tmp_path / "quantized", "--output", tmp_path / "out"), 2, "q_proj", "negative scales")
    assert names(tmp_path) == before
