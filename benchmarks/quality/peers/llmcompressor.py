"""llm-compressor on given token samples; run by the Python of its own environment."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 1
# On a processor without bf16 products, torch takes a hundred times as long for them as for fp32.
BF16 = torch.cuda.is_available() or any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
DTYPE = "auto" if BF16 else torch.float32
IGNORE = ["lm_head", "re:.*mlp.gate$"]
PRESETS = {
    "fp8-dynamic": "FP8_DYNAMIC",
    "fp8-static": "FP8",
    "fp8-block": "FP8_BLOCK",
    "int8": "W8A8",
    "mxfp4": "MXFP4A16",
    "nvfp4": "NVFP4A16",
}

# Its AWQ pins memory for copies to a GPU, and stops where there is none.
if not torch.cuda.is_available():
    IntermediatesCache.pin_memory = lambda *_, **__: None


def weights(scheme: str, observer: str | None) -> dict[str, object]:
    """A modifier's arguments for the scheme of all linears."""
    if scheme in PRESETS:
        return {"targets": "Linear", "ignore": IGNORE, "scheme": PRESETS[scheme]}
    args = {"num_bits": 4, "type": "int", "symmetric": not scheme.endswith("asym"), "strategy": "group"}
    args["group_size"] = int(scheme.split("-g")[1].split("-")[0])
    if observer:
        args["observer"] = observer
    return {"ignore": IGNORE, "config_groups": {"linears": {"targets": ["Linear"], "weights": args}}}


def modifiers(method: str, scheme: str) -> list[object]:
    """The recipe of a method, `[awq+ | smoothquant+]gptq | rtn`; `-mse` picks that observer."""
    base, _, observer = method.partition("-")
    transform, _, quantizer = base.rpartition("+")
    first = {"": [], "awq": [AWQModifier()], "smoothquant": [SmoothQuantModifier(smoothing_strength=0.8)]}[transform]
    return [*first, {"rtn": QuantizationModifier, "gptq": GPTQModifier}[quantizer](**weights(scheme, observer or None))]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "method", "scheme", "output", "result"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    rows = torch.from_numpy(np.load(arguments.rows)).long()
    started = time.monotonic()
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(rows, BATCH)]
    # To torch a list is a data set, which its annotations do not say.
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    free = arguments.method == "rtn" and arguments.scheme != "fp8-static"
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPE),
        tokenizer=AutoTokenizer.from_pretrained(arguments.model),
        recipe=modifiers(arguments.method, arguments.scheme),
        dataset=None if free else loader,
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        output_dir=arguments.output,
    )
    Path(arguments.result).write_text(json.dumps({"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
