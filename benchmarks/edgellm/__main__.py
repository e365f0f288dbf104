"""Our GPTQ, AWQ and FP8 folders through TensorRT Edge-LLM's export, which needs no GPU.

    python -m benchmarks.edgellm

Edge-LLM has an environment of its own (200 MB, `requirements.txt` beside this file), which uses this one's torch. The
table shows the operators and types to which its export turns the codes of each folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from benchmarks.quality.venvs import cache_folder

# Name, recipe, layout, and what one quantized matrix becomes.
FOLDERS = (
    ("gptq", "rtn-w4a16-g128", "gptq", "Int4GroupwiseGemmPluginV2"),
    ("awq", "rtn-w4a16-g128", "awq", "Int4GroupwiseGemmPluginV2"),
    ("fp8", "fp8-dynamic", "compressed-tensors", "FLOAT8E4M3FN"),
)
_LOOK = """
import collections, json, sys, onnx
graph = onnx.load(sys.argv[1], load_external_data=False).graph
found = collections.Counter(node.op_type for node in graph.node)
found.update(onnx.TensorProto.DataType.Name(item.data_type) for item in graph.initializer)
print(json.dumps(found))
"""


def environment() -> Path:
    """The interpreter of Edge-LLM's environment, which is made when missing."""
    folder = cache_folder() / "edgellm"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True, clear=True)
        lines = Path(__file__).with_name("requirements.txt").read_text().splitlines()
        own = [line for line in lines if not line.startswith("tensorrt-edgellm")]
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *own], check=True)
        subprocess.run([*pip, "--no-deps", *(line for line in lines if line not in own)], check=True)
        packages = next((folder / "lib").glob("python*/site-packages"))
        # After its own packages on the path, so that only missing ones come from here.
        (packages / "zz_torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        (folder / "ready").touch()
    return python


def run(*words: str | Path, **variables: str) -> str:
    """A command's output; raises with its last lines when it fails."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError("\n".join([*map(str, words), *done.stderr.splitlines()[-8:]]))
    return done.stdout


def main() -> None:
    """Print the table."""
    python = environment()
    print("| folder | recipe | layout | their export | quantized matrices in it |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as base:
        for name, recipe, layout, wanted in FOLDERS:
            folder, output = Path(base) / name, Path(base) / f"{name}-onnx"
            command = ("quantize", "reference-model", "--recipe", recipe, "--layout", layout, "--output", folder)
            run(sys.executable, "-m", "qwen3_export", *command, "--quiet")
            run(python, "-m", "tensorrt_edgellm.scripts.export", folder, output, CUDA_VISIBLE_DEVICES="")
            found = json.loads(run(python, "-c", _LOOK, output / "llm" / "model.onnx"))
            assert found.get(wanted, 0) > 0, found
            print(f"| {name} | `{recipe}` | {layout} | done | {found[wanted]} {wanted} |", flush=True)


if __name__ == "__main__":
    main()
