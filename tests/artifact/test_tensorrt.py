"""TensorRT folders. The plan's header is read after its documented layout, the ONNX beside it runs in ONNX Runtime;
running the plan itself needs a GPU and is not tested here."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.source import open_source
from qwen3_export.errors import InputError, MissingRuntimeError, UnsupportedError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.ship import tensorrt
from qwen3_export.ship.tensorrt import export_tensorrt
from qwen3_export.ship.tensorrt.plan_file import check_header
from qwen3_export.ship.tensorrt.profiles import Profile, default_profile
from qwen3_export.ship.triton import export_triton
from tests.artifact.plans import header, onnx_weight_bytes
from tests.artifact.support import Exported, largest_difference, load_graph, logits, round_to_nearest
from tests.artifact.test_onnx_standard import check_codes
from tests.cli.helpers import call
from tests.conftest import tiny_config

PLANS = ["original", "gptq-w4a16-g128", "gptq-w4a16-g32"]
CAPABILITIES = ("8.9", "12.0")
MASK = 0x08 | 0x10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path]) -> Callable[[str], Exported]:
    base, made = tmp_path_factory.mktemp("tensorrt"), {}

    def get(name: str) -> Exported:
        if name not in made:
            checkpoint, output = open_source(str(source(name))), base / name
            result = export_tensorrt(checkpoint, output, capabilities=CAPABILITIES, profile=Profile(128, 512))
            made[name] = Exported(output, result, checkpoint)
        return made[name]

    return get


@pytest.mark.parametrize("name", PLANS)
def test_header_of_the_plan(folder: Callable, name: str) -> None:
    exported = folder(name)
    plan = exported.path / "model.plan"
    found = header(plan)
    assert found["magic"] == (b"vtrt", b"vtrt")
    assert found["size"] == plan.stat().st_size
    assert found["mask"] == MASK
    described = json.loads((exported.path / "engine.json").read_text())
    assert ".".join(map(str, found["version"])) == described["version"]


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_stores_the_onnx_weights_and_no_more(folder: Callable, name: str) -> None:
    """A matrix that the builder dequantized, or an embedding stored twice, would show here."""
    exported = folder(name)
    ratio = header(exported.path / "model.plan")["weights"] / onnx_weight_bytes(exported.path)
    # A second profile lays one matrix of this small model out anew.
    assert ratio == pytest.approx(1, abs=0.02 if name == "original" else 0.08)


def test_what_building_took_is_what_was_predicted(folder: Callable) -> None:
    built = folder("gptq-w4a16-g128").result["build"]
    assert built["peak_rss_bytes"] == pytest.approx(built["predicted"]["peak_rss_bytes"], rel=0.15)
    # The prediction is for one processor; others, and one that is busy, take up to twice its time and a little more.
    assert 1 / 3 < built["cpu_seconds"] / built["predicted"]["seconds"] < 3
    assert built["seconds"] > 0.5 * built["cpu_seconds"]
    assert built["profiles"] == 2


@pytest.mark.parametrize("name", PLANS)
def test_engine_json(folder: Callable, name: str) -> None:
    exported = folder(name)
    described = json.loads((exported.path / "engine.json").read_text())
    version = described.pop("version")
    assert version.count(".") >= 2
    assert described == {
        "engine": "rtx",
        "compute_capabilities": ["8.9", "12.0"],
        "precision": "fp16",
        "profile": {"max_prompt": 128, "max_context": 512},
        "profiles": 1 if name == "original" else 2,
        "source_sha256": open_source("reference-model").sha256,
        "plan_bytes": (exported.path / "model.plan").stat().st_size,
        "plan_sha256": sha256_file(exported.path / "model.plan"),
    }
    listed = {item["path"]: item["bytes"] for item in exported.result["files"]}
    assert listed == {path.name: path.stat().st_size for path in exported.path.iterdir()}
    plan_bits = 8 * listed["model.plan"] / exported.source.config.num_parameters
    assert exported.result["bits_per_weight"] == pytest.approx(plan_bits)
    manifest = json.loads((exported.path / "qwen3-export.json").read_text())
    assert (manifest["kind"], manifest["engine"]) == ("tensorrt", "rtx")
    assert manifest["inexact_tensors"] == exported.result["inexact_tensors"]


@pytest.mark.parametrize("name", PLANS)
def test_onnx_beside_the_plan(folder: Callable, torch_logits: Callable, rows: list[NDArray], name: str) -> None:
    exported = folder(name)
    onnx.checker.check_model(str(exported.path / "model.onnx"), full_check=True)
    assert {node.domain for node in load_graph(exported.path).graph.node} == {""}
    session = open_session(exported.path, RuntimeOptions(threads=1))
    assert "plan" in session.runtime, "a report must not pass this off as a run of the plan"
    session.close()
    ours, truth = logits(exported.path, rows), torch_logits(name)
    assert largest_difference(ours, truth) < 0.05
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, truth, strict=True)]
    assert np.concatenate(same).mean() > 0.99


@pytest.mark.parametrize("name", PLANS[1:])
def test_codes_are_the_solvers_and_scales_have_the_activations_type(folder: Callable, name: str) -> None:
    exported = folder(name)
    check_codes(exported)
    scales = [t for t in load_graph(exported.path).graph.initializer if t.name.endswith(".scales")]
    assert len(scales) == len(exported.linears)
    assert {tensor.data_type for tensor in scales} == {onnx.TensorProto.FLOAT16}


def test_16_bit_weights_build_for_the_oldest_capability(make_checkpoint: Callable, tmp_path: Path) -> None:
    result = export_tensorrt(open_checkpoint(make_checkpoint()), tmp_path / "trt", capabilities=("7.5", "12.1"))
    assert header(tmp_path / "trt" / "model.plan")["mask"] == 0x01 | 0x20
    assert json.loads((tmp_path / "trt" / "engine.json").read_text())["profile"] == {
        "max_prompt": 128,
        "max_context": 128,
    }
    assert result["peak_rss_bytes"] > 0


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, group_size=16), QuantScheme(4, group_size=64)], ids=lambda s: s.label
)
def test_other_groups_and_bf16(make_checkpoint: Callable, tmp_path: Path, scheme: QuantScheme) -> None:
    """bf16 activations keep the scales exact; ONNX Runtime has no kernels for them on a CPU."""
    source = make_checkpoint(tiny_config(hidden_size=128, intermediate_size=128))
    checkpoint = round_to_nearest(source, tmp_path / "quantized", ("*", scheme))
    result = export_tensorrt(checkpoint, tmp_path / "trt", capabilities=("8.6",), precision="bf16")
    assert (result["exact"], result["inexact_tensors"]) == (True, [])
    check_codes(Exported(tmp_path / "trt", result, checkpoint))
    ratio = header(tmp_path / "trt" / "model.plan")["weights"] / onnx_weight_bytes(tmp_path / "trt")
    # Expanded codes would be four times as large. Of matrices this small a second profile lays some out anew.
    assert 0.98 < ratio < 1.7


@pytest.mark.parametrize("offset", [0, 16, 27, 32], ids=["magic", "size", "version", "capabilities"])
def test_a_header_that_is_not_what_was_asked_for(folder: Callable, tmp_path: Path, offset: int) -> None:
    plan = folder("gptq-w4a16-g128").path / "model.plan"
    version = ".".join(map(str, header(plan)["version"]))
    check_header(plan, version, CAPABILITIES)
    data = bytearray(plan.read_bytes())
    data[offset] ^= 0x40
    (tmp_path / "model.plan").write_bytes(data)
    with pytest.raises(UnsupportedError, match="header"):
        check_header(tmp_path / "model.plan", version, CAPABILITIES)


def parsed(line: str) -> tuple[list[str], list[dict[str, list[tuple[int, ...]]]]]:
    """What trtexec reads of a line: the shapes behind `--profile=N` are that profile's, up to the next one."""
    words, others = shlex.split(line), []
    profiles: list[dict[str, list[tuple[int, ...]]]] = []
    for word in words:
        option, _, value = word.partition("=")
        if option == "--profile":
            assert int(value) == len(profiles)
            profiles.append({})
        elif option in ("--minShapes", "--optShapes", "--maxShapes"):
            place = ("--minShapes", "--optShapes", "--maxShapes").index(option)
            for spec in value.split(","):
                name, _, dims = spec.rpartition(":")
                found = profiles[-1].setdefault(name, [])
                assert len(found) == place
                found.append(tuple(map(int, dims.split("x"))))
        else:
            others.append(word)
    return others, profiles


def test_the_trtexec_line_is_the_profile(make_checkpoint: Callable, tmp_path: Path) -> None:
    """Every input of the graph, in every profile, with the shapes that our own builder is given."""
    checkpoint, profile = open_checkpoint(make_checkpoint()), Profile(max_prompt=24, max_context=100)
    result = export_tensorrt(checkpoint, tmp_path / "trt", engine="trt", profile=profile, onnx_only=True)
    others, profiles = parsed(result["trtexec"])
    assert others[0] == "trtexec"
    assert f"--onnx={tmp_path / 'trt' / 'model.onnx'}" in others
    assert f"--saveEngine={tmp_path / 'trt' / 'model.plan'}" in others
    assert "--stronglyTyped" in others
    wanted = tensorrt.profiles_of(checkpoint, profile)
    assert profiles == [{name: list(shapes) for name, shapes in one.items()} for one in wanted]
    declared = {item.name: item for item in load_graph(tmp_path / "trt").graph.input}
    for one in profiles:
        assert set(one) == set(declared)
        for name, shapes in one.items():
            fixed = [axis.dim_value for axis in declared[name].type.tensor_type.shape.dim]
            for shape in shapes:
                assert len(shape) == len(fixed)
                assert all(size in (0, own) for size, own in zip(fixed, shape, strict=True))
            assert all(a <= b <= c for a, b, c in zip(*shapes, strict=True))
    assert profiles[0]["input_ids"] == [(1, 1), (1, 12), (1, 24)]
    assert profiles[0]["attention_mask"][2] == (1, 124)
    assert not (tmp_path / "trt" / "model.plan").exists()
    described = json.loads((tmp_path / "trt" / "engine.json").read_text())
    assert described["version"] is None
    inside, shapes = parsed(described["trtexec"])
    assert shapes == profiles
    assert inside == ["trtexec", "--onnx=model.onnx", "--saveEngine=model.plan", *others[3:]]


def test_a_prompt_fits_into_the_cache(make_checkpoint: Callable) -> None:
    config = open_checkpoint(make_checkpoint()).config
    assert default_profile(config, max_context=48) == Profile(48, 48)
    assert default_profile(config, 8192).max_context == 8192
    with pytest.raises(InputError, match=r"--max-prompt 96: .* does not fit into the cache of --max-context 64"):
        default_profile(config, 96, 64)


@pytest.mark.parametrize(
    ("asked", "named"), [(None, "86,89,120"), (("7.5",), "75"), (("12.1", "8.9", "12.1", "8.9"), "121,89")]
)
def test_the_line_for_tensorrt_rtx_names_its_own_tool(
    asked: tuple[str, ...] | None, named: str, make_checkpoint: Callable, tmp_path: Path
) -> None:
    """It has `trtexec`'s options, but none for the typing, and the compute capabilities of engine.json, once each."""
    checkpoint = open_checkpoint(make_checkpoint())
    line = export_tensorrt(checkpoint, tmp_path / "rtx", capabilities=asked, onnx_only=True)["trtexec"]
    described = json.loads((tmp_path / "rtx" / "engine.json").read_text())
    assert [name.replace(".", "") for name in described["compute_capabilities"]] == named.split(",")
    for others, profiles in (parsed(line), parsed(described["trtexec"])):
        assert others[0] == "tensorrt_rtx"
        assert others[3:] == [f"--computeCapabilities={named}", "--skipInference"]
        wanted = tensorrt.profiles_of(checkpoint, default_profile(checkpoint.config))
        assert profiles == [{name: list(shapes) for name, shapes in one.items()} for one in wanted]


def test_without_the_library_the_line_is_the_hint(make_checkpoint: Callable, tmp_path: Path) -> None:
    """TensorRT cannot be installed here: its absence is real."""
    assert importlib.util.find_spec("tensorrt") is None
    checkpoint = open_checkpoint(make_checkpoint())
    with pytest.raises(MissingRuntimeError) as caught:
        export_tensorrt(checkpoint, tmp_path / "trt", engine="trt")
    assert caught.value.exit_code == 3
    hint = caught.value.hint
    _, profiles = parsed(hint[hint.index("trtexec ") :])
    wanted = tensorrt.profiles_of(checkpoint, default_profile(checkpoint.config))
    assert profiles == [{name: list(shapes) for name, shapes in one.items()} for one in wanted]
    assert "--onnx-only" in hint
    assert not (tmp_path / "trt").exists()


def test_a_folder_without_its_plan_says_how_it_is_built(make_checkpoint: Callable, tmp_path: Path) -> None:
    export_tensorrt(open_checkpoint(make_checkpoint()), tmp_path / "trt", engine="trt", onnx_only=True)
    with pytest.raises(InputError, match="its plan has not been built") as caught:
        export_triton(tmp_path / "trt", tmp_path / "repository")
    assert "under trtexec in engine.json" in caught.value.hint
    card = (tmp_path / "trt" / "README.md").read_text()
    assert "an ONNX whose TensorRT plan is built on its device" in card
    assert f"\n{json.loads((tmp_path / 'trt' / 'engine.json').read_text())['trtexec']}\n" in card
    assert "compute capabilities" not in card
    shown = call("inspect", tmp_path / "trt").out
    assert "TensorRT" in shown
    assert "None" not in shown
    assert "--minShapes" not in shown
    assert "not built yet: trtexec in engine.json" in shown
    assert "engine.compute_capabilities" not in shown
    assert card.index("trtexec --onnx") < card.index("--device plan")


def test_inspect_tells_what_a_plan_is_for(folder: Callable) -> None:
    """Of the folder, and of the plan's file alone."""
    place = folder("gptq-w4a16-g128").path
    values = call("inspect", place, "--json").json
    plan_bytes = (place / "model.plan").stat().st_size
    assert values["files"]["model.plan"] == plan_bytes
    assert values["bytes"] == sum((place / name).stat().st_size for name in values["files"])
    assert call("inspect", place / "model.plan", "--json").json == values
    lines = {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in call("inspect", place).out.splitlines()}
    assert lines["plan"].startswith("model.plan, ")
    assert lines["engine"] == "rtx"
    assert lines["engine.compute_capabilities"] == "8.9, 12.0"


def test_a_plans_card_names_its_devices(folder: Callable) -> None:
    card = (folder("gptq-w4a16-g128").path / "README.md").read_text()
    assert "an ONNX and the TensorRT plan built from it" in card
    assert "| compute capabilities | 8.9, 12.0 |" in card
    assert "trtexec" not in card
