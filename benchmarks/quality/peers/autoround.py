"""AutoRound on given token samples; run by the Python of its own environment."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
# On a processor without bf16 products, torch takes a hundred times as long for them as for fp32.
BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
DTYPE = "auto" if BF16 else torch.float32


def iterations(method: str) -> dict[str, object]:
    """`opt-rtn` searches scales, `rtn` does not, `tunedN` runs N steps of signed gradient descent."""
    if method.startswith("tuned"):
        return {"iters": int(method.removeprefix("tuned"))}
    return {"iters": 0, "disable_opt_rtn": method == "rtn"}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "method", "scheme", "output", "result"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    rows = torch.from_numpy(np.load(arguments.rows)).long()
    started = time.monotonic()
    quantizer = AutoRound(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPE),
        AutoTokenizer.from_pretrained(arguments.model),
        scheme="W4A16",
        group_size=int(arguments.scheme.split("-g")[1].split("-")[0]),
        sym=not arguments.scheme.endswith("asym"),
        dataset=[{"input_ids": part} for part in torch.split(rows, BATCH)],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        enable_torch_compile=False,
        **iterations(arguments.method),
    )
    quantizer.quantize_and_save(arguments.output, format="auto_gptq")
    # AutoRound writes into a subfolder that it names itself.
    for path in list(Path(arguments.output).glob("*/*")):
        path.rename(Path(arguments.output) / path.name)
    Path(arguments.result).write_text(json.dumps({"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
