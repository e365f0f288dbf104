"""GPTQModel in a process of its own: importing it changes transformers and starts threads.

    python gptqmodel_process.py JOBS.json

A job `{"quantize": SOURCE, "rows": FILE, "config": {…}, "output": FOLDER}` writes a folder. A job `{"load": FOLDER,
"rows": FILE, "output": FILE}` writes what GPTQModel reads from one: of every quantized linear the units (codes minus
zero points) and the weights in fp32, both `[out, in]`, and the logits of each row in fp32 and in fp16.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# With fewer than three cores GPTQModel's default number of workers is below its loader's minimum, and it stops.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# Without this GPTQModel compiles its dequantization, a minute for each shape.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import METHOD, AWQConfig, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file


def quantize(source: str, rows: list[torch.Tensor], config: dict[str, Any], output: str) -> None:
    """Have GPTQModel write a folder; `config` holds its own settings and the `method`."""
    kind = {"gptq": QuantizeConfig, "awq": AWQConfig}[config.pop("method")]
    model = GPTQModel.load(source, kind(**config), device="cpu")
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows])
    model.save(output)


@torch.no_grad()
def load(folder: str, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Units, weights and logits that GPTQModel reads from a folder."""
    method = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = BACKEND.AWQ_TORCH if method == METHOD.AWQ else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16, attn_implementation="eager")
    model = loaded.model.eval()
    found = {f"fp16.{i}": model(row[None]).logits[0] for i, row in enumerate(rows)}
    # Buffers too, since scales are buffers and multiply in their own type.
    model.float()
    for name, module in list(model.named_modules()):
        if hasattr(module, "qweight"):
            scales = module.scales.float()
            found[f"{name}.weight"] = dequantized(module, scales)
            found[f"{name}.units"] = dequantized(module, torch.ones_like(scales))
            module.scales = scales
            if method == METHOD.AWQ:
                # Its AWQ linear multiplies in 16 bits only.
                plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight.data = found[f"{name}.weight"]
                model.set_submodule(name, plain)
    found |= {f"fp32.{i}": model(row[None]).logits[0] for i, row in enumerate(rows)}
    return {name: value.contiguous() for name, value in found.items()}


def dequantized(module: Any, scales: torch.Tensor) -> torch.Tensor:
    """Its own dequantization `[out, in]` with these scales."""
    if not hasattr(module, "dequantize_weight"):
        bits, group = module.bits, module.group_size
        return dequantize_gemm(module.qweight, module.qzeros, scales, bits, group).T.float().contiguous()
    module.scales = scales
    return module.dequantize_weight().T.float().contiguous()


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        rows = [torch.from_numpy(row.astype(np.int64)) for row in np.load(job["rows"]).values()]
        if "quantize" in job:
            quantize(job["quantize"], rows, job["config"], job["output"])
        else:
            save_file(load(job["load"], rows), job["output"])


if __name__ == "__main__":
    main()
