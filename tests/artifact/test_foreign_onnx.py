"""Decoders that other tools exported: onnxruntime-genai's builder, other names and types of inputs, other places."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qwen3_export.cli import demo
from qwen3_export.cli.console import Console
from qwen3_export.cli.demo_rival import BUILDER, build, builder_is_there
from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.errors import InputError
from qwen3_export.run.artifact import artifact_bytes, open_session, tokenizer_of
from qwen3_export.run.session import RuntimeOptions, greedy
from qwen3_export.ship.onnx import export_onnx
from tests.artifact.support import SAME, THREADS, largest_difference, logits, random_ids
from tests.artifact.test_inspect_artifacts import described
from tests.conftest import cli, tiny_config

IDS = [random_ids(40), random_ids(1)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model by onnxruntime-genai's builder, made as the demo makes it where the builder is installed.

    It has int4 weights, no position ids, and a cache written in place.
    """
    folder = tmp_path_factory.mktemp("builder") / "model"
    assert builder_is_there()
    linears, bits = build(folder)
    assert linears is None
    assert 4 < bits < 16
    return folder


def test_the_demo_compares_with_the_builders_model_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = Console()
    assert BUILDER in [product.name for product in demo._products(tmp_path, show)]
    monkeypatch.setattr(demo, "builder_is_there", lambda: False)
    assert BUILDER not in [product.name for product in demo._products(tmp_path, show)]


def test_the_builders_model_is_validated_timed_inspected_and_run(built: Path, reference_folder: Path) -> None:
    reference = ["--reference", str(reference_folder), "--tokens", "256", "--quiet"]
    for command in (
        ["validate", built, *reference, "--max-kl", "0.5"],
        ["bench", built, "--prompt-tokens", "16", "--new-tokens", "4", "--repeat", "1"],
        ["run", built, "--prompt", "What is 2 + 3?", "--max-new-tokens", "8"],
        ["inspect", built],
    ):
        done = cli(*command)
        assert done.returncode == 0, done.stderr


def test_the_builders_cache_in_place_and_moving_agree(built: Path, tmp_path: Path) -> None:
    moving = shutil.copytree(built, tmp_path / "moving")
    config = (moving / "genai_config.json").read_text()
    assert '"past_present_share_buffer": true' in config
    (moving / "genai_config.json").write_text(config.replace('share_buffer": true', 'share_buffer": false'))
    found = []
    for folder in (built, moving):
        session = open_session(folder, RuntimeOptions(threads=THREADS))
        assert session.context == 2048
        assert tokenizer_of(folder, session).stop_ids()
        found.append(greedy(session, random_ids(300, 8192), 8))
        session.close()
    np.testing.assert_array_equal(*found)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray]]:
    """A folder in standard operators, whose graph the tests below change, and its logits."""
    from tests.conftest import write_checkpoint

    base = tmp_path_factory.mktemp("plain")
    export_onnx(open_checkpoint(write_checkpoint(base / "source", tiny_config())), base / "onnx", "standard")
    return base / "onnx", logits(base / "onnx", IDS)


def changed(folder: Path, output: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy as another tool would leave it: no metadata, no manifest, and a changed graph."""
    shutil.copytree(folder, output)
    (output / "qwen3-export.json").unlink()
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    del model.metadata_props[:]
    change(model)
    (output / "model.onnx").write_bytes(model.SerializeToString())
    return output


def rename(model: onnx.ModelProto, names: Callable[[str], str]) -> None:
    for item in [*model.graph.input, *model.graph.output]:
        old, item.name = item.name, names(item.name)
        for node in model.graph.node:
            for values in (node.input, node.output):
                for i, value in enumerate(values):
                    if value == old:
                        values[i] = item.name


def renamed(model: onnx.ModelProto) -> None:
    def other(name: str) -> str:
        for old, new in (
            ("past_key_values.", "cache_in_"),
            ("present.", "cache_out_"),
            (".key", "_k"),
            (".value", "_v"),
        ):
            name = name.replace(old, new)
        return {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "positions", "logits": "scores"}.get(
            name, name
        )

    rename(model, other)


def anonymous(model: onnx.ModelProto) -> None:
    """Caches named by letters, outputs in the order of the inputs."""
    letters = iter("abcdefghijklmnop")
    rename(model, lambda name: next(letters) if name.startswith(("past", "present")) else name)


def shuffled(model: onnx.ModelProto) -> None:
    """And outputs in another order: no name tells which belongs to which input."""
    anonymous(model)
    caches = [item for item in model.graph.output if item.name != "logits"]
    others = [item for item in model.graph.output if item.name == "logits"]
    del model.graph.output[:]
    model.graph.output.extend([*others, *reversed(caches)])


def one_batch(model: onnx.ModelProto) -> None:
    next(item for item in model.graph.input if item.name == "input_ids").type.tensor_type.shape.dim[0].dim_value = 2


def one_token(model: onnx.ModelProto) -> None:
    next(item for item in model.graph.input if item.name == "input_ids").type.tensor_type.shape.dim[1].dim_value = 1


def int32_ids(model: onnx.ModelProto) -> None:
    rename(model, lambda name: f"{name}_wide" if name in ("input_ids", "position_ids", "attention_mask") else name)
    for item in model.graph.input[:3]:
        wide, item.name = item.name, item.name.removesuffix("_wide")
        item.type.tensor_type.elem_type = TensorProto.INT32
        model.graph.node.insert(0, helper.make_node("Cast", [item.name], [wide], to=TensorProto.INT64))


def more_inputs(model: onnx.ModelProto) -> None:
    for name, kind, shape in (
        ("use_cache_branch", TensorProto.BOOL, [1]),
        ("cache_position", TensorProto.INT64, ["sequence_length"]),
        ("num_logits_to_keep", TensorProto.INT64, []),
        ("past_sequence_length", TensorProto.INT32, [1]),
        ("total_sequence_length", TensorProto.INT32, []),
    ):
        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def symbolic(model: onnx.ModelProto) -> None:
    """Axes as optimum leaves them: the vocabulary and the key/value heads without numbers."""
    logits = next(item for item in model.graph.output if item.name == "logits")
    logits.type.tensor_type.shape.dim[2].dim_param = "vocab"
    for item in [*model.graph.input, *model.graph.output]:
        if item.name.startswith(("past", "present")):
            item.type.tensor_type.shape.dim[1].dim_param = "heads"


OTHERS = [renamed, anonymous, int32_ids, more_inputs, lambda model: None]


@pytest.mark.parametrize("change", OTHERS, ids=lambda f: f.__name__)
def test_other_names_types_and_inputs(plain: tuple[Path, list[NDArray]], tmp_path: Path, change: Callable) -> None:
    folder = changed(plain[0], tmp_path / "other", change)
    assert largest_difference(logits(folder, IDS), plain[1]) < SAME
    session = open_session(folder, RuntimeOptions(threads=THREADS))
    ours = open_session(plain[0], RuntimeOptions(threads=THREADS))
    np.testing.assert_array_equal(greedy(session, IDS[0], 6), greedy(ours, IDS[0], 6))
    assert session.vocab_size == 320
    for opened in (session, ours):
        opened.close()


def test_what_the_graph_leaves_open_is_read_beside_it(plain: tuple[Path, list[NDArray]], tmp_path: Path) -> None:
    folder = changed(plain[0], tmp_path / "other", symbolic)
    shutil.copyfile(plain[0].parent / "source" / "config.json", folder / "config.json")
    assert largest_difference(logits(folder, IDS), plain[1]) < SAME
    session = open_session(folder)
    assert (session.vocab_size, session.context) == (320, 128)
    session.close()


def test_fp16_caches(make_checkpoint: Callable, tmp_path: Path) -> None:
    export_onnx(open_checkpoint(make_checkpoint()), tmp_path / "onnx", "standard", precision="fp16")
    folder = changed(tmp_path / "onnx", tmp_path / "other", renamed)
    assert largest_difference(logits(folder, IDS), logits(tmp_path / "onnx", IDS)) == 0


def test_graphs_in_other_places(plain: tuple[Path, list[NDArray]], reference_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "repository" / "onnx"
    shutil.copytree(plain[0], place)
    (place / "model.onnx").rename(place / "model_fp32.onnx")
    shutil.copyfile(reference_folder / "tokenizer.json", tmp_path / "repository" / "tokenizer.json")
    file = place / "model_fp32.onnx"
    for artifact in (tmp_path / "repository", place, file):
        assert largest_difference(logits(artifact, IDS), plain[1]) == 0
    session = open_session(file)
    assert len(tokenizer_of(file, session).encode("hello"))
    session.close()
    assert artifact_bytes(file) == file.stat().st_size + (place / "model.onnx.data").stat().st_size
    shutil.copyfile(file, place / "model_other.onnx")
    with pytest.raises(InputError, match=r"several ONNX graphs.*model_fp32\.onnx") as caught:
        open_session(tmp_path / "repository")
    assert "itself" in (caught.value.hint or "")


def no_cache(model: onnx.ModelProto) -> None:
    for items in (model.graph.input, model.graph.output):
        kept = [item for item in items if not item.name.startswith(("past", "present"))]
        del items[:]
        items.extend(kept)
    for layer in range(2):
        for kind in ("key", "value"):
            zeros = np.zeros((1, 2, 0, 32), np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, f"past_key_values.{layer}.{kind}"))


def pixels(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 8]))


def no_logits(model: onnx.ModelProto) -> None:
    kept = [item for item in model.graph.output if item.name != "logits"]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def last_logits(model: onnx.ModelProto) -> None:
    no_logits(model)
    model.graph.node.append(helper.make_node("ReduceMax", ["logits", "axis_1"], ["last_logits"], keepdims=0))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis_1"))
    model.graph.output.append(helper.make_tensor_value_info("last_logits", TensorProto.FLOAT, ["b", 320]))


def fewer_presents(model: onnx.ModelProto) -> None:
    model.graph.output.pop()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_cache, "no past keys and values"),
        (pixels, "pixel_values"),
        (no_logits, "no logits"),
        (last_logits, r"last_logits has shape \['b', 320\]"),
        (fewer_presents, "4 past inputs, but 3 present"),
        (shuffled, "named without layers, and not in one order"),
        (one_batch, r"input_ids has shape \[2, 'sequence_length'\], one sequence of any length"),
        (one_token, r"input_ids has shape \['batch_size', 1\], one sequence of any length"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_decoder_with_a_cache_is_refused(
    plain: tuple[Path, list[NDArray]], tmp_path: Path, change: Callable, reason: str
) -> None:
    folder = changed(plain[0], tmp_path / "other", change)
    with pytest.raises(InputError, match=reason) as caught:
        open_session(folder)
    assert caught.value.hint
    # What names and shapes tell, `inspect` says without running it.
    told = described(folder).get("no decoder", "")
    assert change is shuffled or re.search(reason, told)


def test_inspect_names_a_missing_data_file(plain: tuple[Path, list[NDArray]], tmp_path: Path) -> None:
    folder = changed(plain[0], tmp_path / "other", lambda model: None)
    assert not {"missing files", "no decoder"} & set(described(folder))
    (folder / "model.onnx.data").unlink()
    assert described(folder)["missing files"] == ["model.onnx.data"]
