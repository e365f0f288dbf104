"""`gguf` and `calibrate` on the command line: types, patterns, shards, requantizing, importance matrices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen3_export import __version__
from qwen3_export.cli.exported import _requantized
from qwen3_export.core.gguf_header import GgufTensor, read_gguf_header
from qwen3_export.ship.gguf import encode
from tests.cli.helpers import call, refused


@pytest.fixture(scope="module")
def matrix(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "imatrix.gguf"
    command = ("calibrate", model, "--output", path, "--samples", "4", "--sequence-length", "32", "--json")
    values = call(*command).json
    assert (values["output"], values["samples"], values["tokens"]) == (str(path), 4, 128)
    assert values["experts"] is None
    assert values["tensors"] == 14
    assert values["bytes"] == path.stat().st_size
    return path


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_gguf_header(path).tensors}


def values_bytes(values: dict[str, Any]) -> int:
    return sum(item["bytes"] for item in values["files"])


def data_of(path: Path, tensor: GgufTensor) -> bytes:
    return path.read_bytes()[tensor.begin :][: tensor.bytes]


def test_every_option_at_once(model: Path, matrix: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    outcome = call(
        "gguf", model, "--output", output, "--type", "q5_0", "--tensor-type", "Attn_V=Q8_0", "--tensor-type",
        r"blk\.1\.=iq4_nl", "--token-embedding-type", "q8_0", "--imatrix", matrix, "--split-max-size", "1M", "--json",
    )  # fmt: skip
    values = outcome.json
    large = "warning: token_embd.weight has 1.1 MB, more than --split-max-size: it gets a larger shard of its own"
    assert outcome.err.splitlines().count(large) == 1
    parts = [tmp_path / item["path"] for item in values["files"]]
    assert values["output"] == str(parts[0])
    assert len(parts) > 1
    assert all(part.is_file() for part in parts)
    found = types_of(parts[0])
    assert found["token_embd.weight"] == "q8_0"
    assert found["blk.0.attn_v.weight"] == found["blk.1.attn_v.weight"] == "q8_0"
    assert found["blk.1.attn_q.weight"] == "iq4_nl"
    assert found["blk.0.attn_q.weight"] == "q5_0"
    assert read_gguf_header(parts[0]).values["quantize.imatrix.file"] == "imatrix.gguf"
    assert sorted(tmp_path.iterdir()) == sorted(parts)
    assert len(parts) == 2
    for number, part in enumerate(parts, 1):
        seen = call("inspect", part, "--json").json
        assert seen["provenance"]["written by"] == "qwen3-export"
        assert seen["provenance"]["version"] == __version__
        assert seen["shard"] == f"{number} of 2, all of which are described"
        assert seen["bytes"] == values_bytes(values)


REFUSED = {
    "type": (("--type", "q4_k_x"), "--type q4_k_x: one of f16, bf16"),
    "pattern": (("--tensor-type", "attn_v"), "--tensor-type attn_v: PATTERN=TYPE was expected"),
    "its type": (("--tensor-type", "attn_v=q4_k_m"), "--tensor-type attn_v=q4_k_m: one of"),
    "expression": (("--tensor-type", "(=q4_k"), "not a regular expression"),
    "in no name": (
        ("--tensor-type", "attn_qkv=q8_0"),
        "--tensor-type attn_qkv=q8_0: found in no name of a tensor that can have another type\n"
        "hint: names are such as token_embd.weight, blk.0.ffn_down.weight, blk.1.attn_q.weight, blk.1.attn_v.weight",
    ),
    "norm": (
        ("--tensor-type", "NORM=q8_0"),
        "--tensor-type NORM=q8_0: found in no name of a tensor that can have another type; blk.0.attn_norm.weight is "
        "always of type f32\nhint: names are such as token_embd.weight",
    ),
    "decided": (
        ("--token-embedding-type", "q8_0", "--tensor-type", "attn=q8_0", "--tensor-type", "attn_v|token_embd=q4_0"),
        "--tensor-type attn_v|token_embd=q4_0: another option decides the type of blk.0.attn_v.weight and of all",
    ),
    "tied": (
        ("--token-embedding-type", "q8_0", "--output-type", "q4_0"),
        "--output-type q4_0: the head is the embedding here, and --token-embedding-type q8_0 decides its type",
    ),
    "tied to a pattern": (
        ("--tensor-type", "token_embd=q8_0", "--output-type", "q4_0"),
        "--output-type q4_0: the head is the embedding here, and --tensor-type for token_embd.weight, q8_0, decides",
    ),
    "shard": (("--split-max-size", "small"), "--split-max-size small: a size such as 4G was expected"),
    "small shard": (
        ("--split-max-size", "999kB"),
        "--split-max-size: 999000 bytes are too few for a shard\nhint: give 1M",
    ),
    "matrix": (("--imatrix", "nowhere.gguf"), "nowhere.gguf: cannot be read"),
    "row": (("--token-embedding-type", "q4_k"), "inputs are not divisible by 256"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_mistakes_are_told_before_anything_is_written(
    model: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    refused(call("gguf", model, "--output", tmp_path / "model.gguf", *options), 2, message)
    assert not list(tmp_path.iterdir())


NOT_WEIGHED = {
    "bf16": ("model", (), "bf16 is not rounded by importance"),
    "f16": ("model", ("--type", "f16"), "f16 is not rounded by importance"),
    "q8_0": ("model", ("--type", "q8_0"), "q8_0 is not rounded by importance"),
    "the embedding alone": ("model", ("--token-embedding-type", "q4_0"), "such as token_embd.weight"),
    "recipe": ("model", ("--recipe", "gguf-q4_0"), "quantized weights are moved as they are"),
    "codes": ("quantized", (), "quantized weights are moved as they are"),
}


@pytest.mark.parametrize(("source", "options", "reason"), NOT_WEIGHED.values(), ids=NOT_WEIGHED.keys())
def test_a_matrix_that_nothing_is_rounded_with_is_refused(
    model: Path, made: dict[str, Path], matrix: Path, tmp_path: Path, source: str, options: tuple[str, ...], reason: str
) -> None:
    command = ("gguf", {"model": model, **made}[source], "--output", tmp_path / "model.gguf", "--imatrix", matrix)
    refused(call(*command, *options), 2, "--imatrix imatrix.gguf: no weight", reason, "leave --imatrix away")
    assert not list(tmp_path.iterdir())


def test_a_matrix_that_one_tensor_is_rounded_with_is_named(model: Path, matrix: Path, tmp_path: Path) -> None:
    command = ("gguf", model, "--type", "q8_0", "--tensor-type", r"blk\.1\.ffn_down=q4_0")
    for name, options in {"plain": (), "weighed": ("--imatrix", matrix)}.items():
        assert call(*command, *options, "--output", tmp_path / f"{name}.gguf", "-q").code == 0
    plain, weighed = (read_gguf_header(tmp_path / f"{name}.gguf") for name in ("plain", "weighed"))
    assert "quantize.imatrix.file" not in plain.values
    assert weighed.values["quantize.imatrix.file"] == "imatrix.gguf"
    changed = {
        one.name
        for one, other in zip(plain.tensors, weighed.tensors, strict=True)
        if data_of(tmp_path / "plain.gguf", one) != data_of(tmp_path / "weighed.gguf", other)
    }
    assert changed == {"blk.1.ffn_down.weight"}


def test_codes_are_rounded_again_on_request_alone(made: dict[str, Path], tmp_path: Path) -> None:
    command = ("gguf", made["quantized"], "--output", tmp_path / "model.gguf", "--type", "q5_1")
    refused(call(*command), 2, "--type q5_1", "q4_0", "--allow-requantize")
    values = call(*command, "--allow-requantize", "--json").json
    assert {item["to"] for item in values["requantized"]} == {"q5_1"}
    assert len(values["requantized"]) == 14
    assert set(types_of(tmp_path / "model.gguf").values()) == {"q5_1", "q8_0", "f32"}
    worst = max(item["max_rel_error"] for item in values["requantized"])
    assert _requantized(values["requantized"]).startswith("14 tensors: 14 from ")
    assert _requantized(values["requantized"]).endswith(f" to q5_1, relative error up to {worst:.1e}")


def test_types_are_named_in_any_case(tmp_path: Path) -> None:
    """As in `llama-quantize`."""
    files = []
    for name, embedding in (("a", "q8_0"), ("b", "Q8_0")):
        files.append(tmp_path / f"{name}.gguf")
        options = ("--type", "q4_k_m" if name == "a" else "Q4_K_M", "--token-embedding-type", embedding)
        outcome = call("gguf", "reference-model", *options, "--output", files[-1])
        assert outcome.code == 0, outcome.err
    assert files[0].read_bytes() == files[1].read_bytes()


def test_threads_limit_the_rounding_and_change_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Recording(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            asked.append(count)
            super().__init__(count)

    monkeypatch.setattr(encode, "ThreadPoolExecutor", Recording)
    sums = set[str]()
    for threads in (1, 3):
        command = ("gguf", model, "--type", "q4_0", "--threads", threads, "--output", tmp_path / f"{threads}.gguf")
        sums.add(call(*command, "--json").json["files"][0]["sha256"])
        assert set(asked) == {threads}
        asked.clear()
    assert len(sums) == 1


def test_a_matrix_is_not_replaced_unasked(model: Path, matrix: Path) -> None:
    before = matrix.read_bytes()
    refused(
        call("calibrate", model, "--output", matrix, "--samples", "1", "--sequence-length", "16"), 2, "exists already"
    )
    assert matrix.read_bytes() == before


def test_inspect_shows_a_rounded_file(model: Path, tmp_path: Path) -> None:
    assert call("gguf", model, "--output", tmp_path / "model.gguf", "--type", "q5_0", "-q").code == 0
    outcome = call("inspect", tmp_path / "model.gguf")
    assert outcome.code == 0
    assert "q5_0" in outcome.out
    assert "written by            qwen3-export\n" in outcome.out


def test_inspect_does_not_call_a_converters_file_somebody_elses(model: Path, tmp_path: Path) -> None:
    assert call("gguf", model, "--output", tmp_path / "model.gguf", "-q").code == 0
    found = call("inspect", tmp_path / "model.gguf", "--json").json
    assert found["provenance"]["written by"].startswith("llama.cpp's converter, or qwen3-export")
    assert "shard" not in found
