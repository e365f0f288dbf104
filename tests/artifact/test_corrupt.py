"""Damaged artifacts: one InputError each, of one line, and no crash. They are opened in a process of their own,
because a runtime in C++ that crashes takes everything with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

OPEN_ALL = """
import json, sys
from pathlib import Path
import numpy as np
from qwen3_export.errors import ExportError
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import RuntimeOptions
for path in map(Path, json.loads(sys.argv[1])):
    try:
        session = open_session(path, RuntimeOptions(threads=1, context=64))
        answer = ["opened", str(session.prefill(np.arange(4, dtype=np.int32)).shape)]
    except ExportError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps([str(path), *answer]), flush=True)
"""


def open_all(paths: list[Path]) -> dict[Path, tuple[str, str]]:
    """`{path: (class of the error, its text)}`; the process must have lived through all of them."""
    command = [sys.executable, "-c", OPEN_ALL, json.dumps([str(path) for path in paths])]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("[")]
    assert child.returncode == 0, f"died at artifact {len(lines)} of {len(paths)}: {child.stderr[-500:]}"
    return {Path(path): (kind, text) for path, kind, text in lines}


def check_refused(damaged: dict[str, Path]) -> None:
    answers = open_all(list(damaged.values()))
    assert answers.keys() == set(damaged.values())
    for name, path in damaged.items():
        kind, text = answers[path]
        assert kind == "InputError", f"{name}: {kind} {text}"
        assert str(path) in text, name
        assert "\n" not in text, name


def noise(count: int) -> bytes:
    return np.random.default_rng(3).bytes(count)


@pytest.mark.parametrize("name", ["original", "gptq-w4a16-g128"])
def test_gguf(gguf_file: Callable, tmp_path: Path, name: str) -> None:
    original = gguf_file(name).path
    data, start = original.read_bytes(), int(gguf.GGUFReader(original).data_offset)
    cuts = (0, 3, 4, 12, 24, 1000, start // 2, start - 1, start, start + 1000, len(data) // 2, len(data) - 1)
    cases = {f"cut to {size}": data[:size] for size in cuts}
    cases["noise"] = noise(5000)
    cases["noise after the magic"] = b"GGUF" + noise(5000)
    cases["text"] = b"This is no model.\n" * 100
    cases["version 99"] = data[:4] + (99).to_bytes(4, "little") + data[8:]
    cases["tensors without end"] = data[:8] + b"\xff" * 8 + data[16:]
    cases["keys without end"] = data[:16] + b"\xff" * 8 + data[24:]
    cases["another architecture"] = data.replace(b"qwen3", b"qwen9")
    damaged = {}
    for number, (case, content) in enumerate(cases.items()):
        damaged[case] = tmp_path / f"{number}.gguf"
        damaged[case].write_bytes(content)
    check_refused(damaged)
    (tmp_path / "whole.gguf").write_bytes(data)
    assert open_all([tmp_path / "whole.gguf"])[tmp_path / "whole.gguf"] == ("opened", "(4, 8192)")


def damaged_copy(folder: Path, target: Path, file: str, content: bytes | None) -> Path:
    """A copy of an artifact folder with one file replaced, or removed when `content` is None."""
    shutil.copytree(folder, target)
    if content is None:
        (target / file).unlink()
    else:
        (target / file).write_bytes(content)
    return target


@pytest.mark.parametrize("flavor", ["ort", "standard"])
def test_onnx(onnx_folder: Callable, tmp_path: Path, flavor: str) -> None:
    folder = onnx_folder("gptq-w4a16-g128", flavor=flavor).path
    model, data = ((folder / name).read_bytes() for name in ("model.onnx", "model.onnx.data"))
    cases: dict[str, tuple[str, bytes | None]] = {
        f"model.onnx cut to {size}": ("model.onnx", model[:size])
        for size in (0, 10, 1000, len(model) // 2, len(model) - 1)
    }
    cases["model.onnx of noise"] = ("model.onnx", noise(5000))
    cases["model.onnx of text"] = ("model.onnx", b"This is no model.\n" * 100)
    cases["no data"] = ("model.onnx.data", None)
    cases |= {
        f"data cut to {size}": ("model.onnx.data", data[:size]) for size in (0, 1000, len(data) // 2, len(data) - 1)
    }
    damaged = {
        case: damaged_copy(folder, tmp_path / str(number), *change)
        for number, (case, change) in enumerate(cases.items())
    }
    check_refused(damaged)
    assert open_all([folder])[folder] == ("opened", "(4, 8192)")


def test_no_artifact_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    check_refused({name: tmp_path / name for name in ("empty", "file.txt", "missing")})


def test_what_llama_cpp_asserts_is_one_line(gguf_file: Callable, tmp_path: Path) -> None:
    """Two equal tokens: llama.cpp would abort and print its stack."""
    data, path = gguf_file("original").path.read_bytes(), tmp_path / "twice.gguf"
    token = b"\2\0\0\0\0\0\0\0" + "£".encode()
    assert data.count(token) == 1
    path.write_bytes(data.replace(token, b"\2\0\0\0\0\0\0\0" + "¢".encode()))
    command = [sys.executable, "-m", "qwen3_export", "run", str(path), "--prompt", "hi", "--max-new-tokens", "2"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: {path}: llama.cpp gave the file up (llama-vocab.cpp:")
    assert child.stderr.count("\n") == 1
    assert not child.stdout
