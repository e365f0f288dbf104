"""`python -m benchmarks.experts`: exports and runs a slice as wide as Qwen3-30B-A3B.

Its quantized folder is written with random codes, tensor by tensor. Export, ONNX Runtime and onnxruntime-genai run in
separate processes, so that the peak memory of each is known.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.report import table
from benchmarks.runtime.machine import describe
from qwen3_export.core.layouts import DEFAULT, layout
from qwen3_export.core.manifest import to_json, write_manifest
from qwen3_export.core.qwen3 import Qwen3Config, block_name, parse_config
from qwen3_export.core.resources import resource
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.shards import INDEX
from qwen3_export.core.tensor import SCALE_TYPES, QuantizedTensor
from qwen3_export.core.tensorfile import write_tensors

# config.json of Qwen3-30B-A3B, without the number of layers.
WIDTHS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 151645,
    "bos_token_id": 151643,
}
SCHEME = QuantScheme(4, group_size=128)
PROMPT, NEW_TOKENS = 32, 8


def make_slice(folder: Path, layers: int) -> None:
    """A quantized folder with random codes, one shard a layer."""
    folder.mkdir(parents=True)
    raw = {**WIDTHS, "num_hidden_layers": layers}
    config = parse_config(raw, "slice")
    schemes = dict.fromkeys(config.all_linears(), SCHEME)
    module = layout(DEFAULT)
    raw["quantization_config"] = module.config(schemes, list(schemes))
    (folder / "config.json").write_text(json.dumps(raw))
    random, where = np.random.default_rng(0), dict[str, str]()
    shards = [("outer", outer_tensors(config, random))]
    shards += [(f"layer-{i}", layer_tensors(config, i, random, module)) for i in range(layers)]
    for name, tensors in shards:
        found = dict(tensors)
        write_tensors(folder / f"{name}.safetensors", found.items())
        where.update(dict.fromkeys(found, f"{name}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    source = {"source": {"name": "random slice", "sha256": "0" * 64}, "recipe": {"name": "random"}, "layout": DEFAULT}
    write_manifest(folder, "quantized", {**source, "tensors": {n: {"scheme": s.to_dict()} for n, s in schemes.items()}})
    reference = resource("calibration") / "reference-model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(reference / name, folder / name)
    (folder / "generation_config.json").write_text(to_json({"eos_token_id": 151645}))


def outer_tensors(config: Qwen3Config, random: np.random.Generator) -> Iterator[tuple[str, NDArray]]:
    """Embedding, head and last norm in bf16."""
    for name, shape in config.outer_shapes().items():
        values = random.standard_normal(shape, np.float32) * 0.02 if len(shape) == 2 else np.ones(shape, np.float32)
        yield name, values.astype(ml_dtypes.bfloat16)


def layer_tensors(
    config: Qwen3Config, layer: int, random: np.random.Generator, module: Any
) -> Iterator[tuple[str, NDArray]]:
    """One layer: norms, router, and codes with a nearly normal distribution."""
    prefix = block_name(layer)
    for name, shape in config.other_shapes(layer).items():
        values = np.ones(shape, np.float32) if len(shape) == 1 else random.standard_normal(shape, np.float32) * 0.05
        yield f"{prefix}.{name}.weight", values.astype(ml_dtypes.bfloat16)
    for name, shape in config.linear_shapes(layer).items():
        codes = random.integers(0, 16, shape, np.uint8)
        scales = random.uniform(0.5, 1.5, SCHEME.grid(shape)) / (4.6 * np.sqrt(shape[1]))
        tensor = QuantizedTensor(
            f"{prefix}.{name}", shape, SCHEME, codes, scales.astype(SCALE_TYPES[SCHEME.scale_dtype])
        )
        yield from module.pack(tensor).items()


RUN = """
import json, sys, time
import numpy as np
from pathlib import Path
from qwen3_export.core.progress import peak_rss_bytes
from qwen3_export.run.artifact import open_session
from qwen3_export.run.session import greedy
ids = np.arange(100, 100 + int(sys.argv[2]), dtype=np.int32)
session = open_session(Path(sys.argv[1]))
session.prefill(ids[:1])
start = time.perf_counter(); session.prefill(ids); prompt = time.perf_counter() - start
start = time.perf_counter(); tokens = greedy(session, ids, int(sys.argv[3])).tolist()
seconds = time.perf_counter() - start - prompt
print(json.dumps({"tokens": tokens, "prefill_tokens_per_second": len(ids) / prompt,
    "decode_tokens_per_second": (len(tokens) - 1) / seconds, "peak_rss_bytes": peak_rss_bytes()}))
"""
GENAI = """
import json, sys
import onnxruntime_genai as genai
from qwen3_export.core.progress import peak_rss_bytes
ids = list(range(100, 100 + int(sys.argv[2])))
model = genai.Model(sys.argv[1])
parameters = genai.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=len(ids) + int(sys.argv[3]))
generator = genai.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
tokens = [int(token) for token in generator.get_sequence(0)[len(ids):]]
print(json.dumps({"tokens": tokens, "peak_rss_bytes": peak_rss_bytes()}))
"""


def child(code: str, *arguments: str | Path) -> dict[str, Any]:
    """The JSON that a Python process prints last."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make the slice, export it, and run it in both runtimes."""
    make_slice(base / "source", options.layers)
    code = "from qwen3_export.cli import main; main()"
    arguments = ["onnx", base / "source", "--output", base / "onnx", "--accuracy-level", options.level, "--json"]
    result = child(code, *arguments)
    report = {
        "layers": options.layers,
        "export": {key: result[key] for key in ("peak_rss_bytes", "seconds", "bits_per_weight", "expert_layers")},
        "bytes": sum(item["bytes"] for item in result["files"]),
    }
    if not options.export_only:
        shutil.rmtree(base / "source")
        report["onnxruntime"] = child(RUN, base / "onnx", str(PROMPT), str(NEW_TOKENS))
        report["onnxruntime-genai"] = child(GENAI, base / "onnx", str(PROMPT), str(NEW_TOKENS))
    return report


def page(report: dict[str, Any], level: str) -> str:
    """The results file."""
    export, ours, genai = (report.get(key) for key in ("export", "onnxruntime", "onnxruntime-genai"))
    assert export
    lines = [
        "# Mixture of experts in ONNX Runtime",
        "",
        f"`python -m benchmarks.experts --layers {report['layers']} --level {level}`: layers as wide as",
        "Qwen3-30B-A3B's, 128 experts each, random 4-bit codes in groups of 128.",
        "",
        describe(("onnxruntime", "onnxruntime-genai")),
        "",
        f"Layers by operator: {json.dumps(export['expert_layers'])}; {report['bytes'] / 1e9:.2f} GB, "
        f"{export['bits_per_weight']:.2f} bits per weight.",
        "",
    ]
    rows = [["export", f"{export['peak_rss_bytes'] / 1e6:.0f}", f"{export['seconds']:.1f} s"]]
    if ours and genai:
        speed = f"{ours['prefill_tokens_per_second']:.1f} and {ours['decode_tokens_per_second']:.1f} tokens/s"
        same = "the same" if genai["tokens"] == ours["tokens"] else "other"
        rows += [
            [f"ONNX Runtime, {PROMPT} tokens and {NEW_TOKENS} new ones", f"{ours['peak_rss_bytes'] / 1e6:.0f}", speed],
            ["onnxruntime-genai, the same", f"{genai['peak_rss_bytes'] / 1e6:.0f}", f"{same} greedy tokens"],
        ]
    return "\n".join([*lines, table(["process", "peak MB", ""], rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--level", default="4", help="accuracy level of the export")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed at the end)")
    parser.add_argument("--export-only", action="store_true")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    base = options.folder or Path(tempfile.mkdtemp())
    try:
        report = measure(base, options)
    finally:
        if options.folder is None:
            shutil.rmtree(base)
    print(json.dumps(report, indent=2))
    if options.output:
        options.output.write_text(page(report, options.level), encoding="utf-8")


if __name__ == "__main__":
    main()
