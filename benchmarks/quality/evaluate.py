"""KL(original ‖ quantized) over held-out samples, in a process of its own.

The original's log-probabilities are computed once per checkpoint and kept beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.quality.folders import load, quantization_of
from benchmarks.quality.samples import read_samples


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """fp32 log-probabilities `[len(ids) − 1, vocab]`, without the last position."""
    logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
    return logits.float().log_softmax(-1)


def original(folder: Path, samples: list[np.ndarray], cache: Path) -> np.ndarray:
    """The original's log-probabilities of all rows, computed once and kept in `cache`."""
    if not cache.is_file():
        model, partial = load(folder), cache.with_suffix(".partial.npy")
        positions = sum(len(row) - 1 for row in samples)
        array = np.lib.format.open_memmap(partial, "w+", np.float32, (positions, model.config.vocab_size))
        begin = 0
        for row in samples:
            array[begin : begin + len(row) - 1] = log_probabilities(model, row)
            begin += len(row) - 1
        array.flush()
        partial.rename(cache)
    return np.load(cache, mmap_mode="r")


@torch.inference_mode()
def measure(folder: Path, samples: list[np.ndarray], domains: list[str], truth: np.ndarray) -> dict:
    """Mean KL and top-1 agreement of every domain of the held-out text."""
    model, begin = load(folder), 0
    kl: dict[str, list[torch.Tensor]] = {domain: [] for domain in domains}
    same: dict[str, list[torch.Tensor]] = {domain: [] for domain in domains}
    for row, domain in zip(samples, domains, strict=True):
        q = log_probabilities(model, row)
        p = torch.from_numpy(np.array(truth[begin : begin + len(row) - 1]))
        kl[domain].append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
        same[domain].append((p.argmax(-1) == q.argmax(-1)).double())
        begin += len(row) - 1
    values = {domain: (torch.cat(kl[domain]), torch.cat(same[domain])) for domain in kl}
    return {
        "domains": {
            d: {"tokens": len(k), "kl": float(k.mean()), "top1": float(t.mean())} for d, (k, t) in values.items()
        },
        "activations": activations(folder),
    }


def activations(folder: Path) -> str:
    """How the evaluated forward pass rounds activations: the first scheme's, or `16 bit`."""
    quantization = quantization_of(folder)
    if quantization.get("quant_method") == "fp8":
        return "float8 dynamic group"
    for group in quantization.get("config_groups", {}).values():
        if args := group.get("input_activations"):
            kind = "dynamic" if args["dynamic"] else "static"
            return f"{args['type']}{args['num_bits']} {kind} {args['strategy']}"
    return "16 bit"


def main() -> None:
    source, folder, heldout, cache, result = map(Path, sys.argv[1:])
    samples, domains = read_samples(heldout)
    truth = original(source, samples, cache)
    result.write_text(json.dumps(measure(folder, samples, domains, truth)))


if __name__ == "__main__":
    main()
