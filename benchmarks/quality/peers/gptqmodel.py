"""GPTQModel on given token samples; run by the Python of its own environment.

It sorts rows by length; ours all have one length, so it sees exactly these tokens in this order.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

# With fewer than three cores GPTQModel's default number of workers is below its loader's minimum, and it stops.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from gptqmodel import GPTQModel
from gptqmodel.quantization import AWQConfig, GPTAQConfig, QuantizeConfig, RTNConfig


def config(method: str, scheme: str) -> QuantizeConfig | RTNConfig | AWQConfig:
    """GPTQModel's configuration of a method; everything else is its default."""
    shape = {"bits": 4, "group_size": int(scheme.split("-g")[1].split("-")[0]), "sym": not scheme.endswith("asym")}
    if method == "rtn":
        return RTNConfig(**shape)
    if method == "awq":
        return AWQConfig(**shape)
    extra = {
        "gptq": {},
        "gptq-mse": {"mse": 2.4},
        "gptaq": {"gptaq": GPTAQConfig()},
    }[method]
    return QuantizeConfig(**shape, **extra)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "method", "scheme", "output", "result"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    rows = np.load(arguments.rows)
    started = time.monotonic()
    model = GPTQModel.load(arguments.model, config(arguments.method, arguments.scheme), device="cpu")
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(None if arguments.method == "rtn" else examples)
    model.save(arguments.output)
    Path(arguments.result).write_text(json.dumps({"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
