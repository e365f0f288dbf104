"""`python -m benchmarks.onnx.judge ORIGINAL FOLDER…`: KL(original ‖ folder) in plain onnxruntime.

It imports nothing of this project. transformers computes the original's logits; the folder's come from a session that
is fed `input_ids`, a mask of ones, positions if the graph has them, and an empty cache. It prints one JSON object per
folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

_TEXT = Path(__file__).resolve().parents[2] / "calibration" / "heldout.jsonl"
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


def rows_of(folder: Path, text: Path, tokens: int, window: int) -> list[NDArray[np.int64]]:
    """Windows of the documents in turn, so that the first hold every domain."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = [json.loads(line).get("text") for line in text.read_text(encoding="utf-8").splitlines()]
    ids = [np.array(tokenizer.encode(document).ids) for document in documents if document]
    pieces = [row[:window] for row in ids if len(row) >= window]
    return pieces[:: max(1, len(pieces) * window // tokens)]


def originals(folder: Path, rows: list[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
    """Log-probabilities of every position, by transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [log_softmax(model(torch.from_numpy(row)[None]).logits[0].double().numpy()) for row in rows]


def log_softmax(x: NDArray) -> NDArray[np.float64]:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def answers(session: Any, row: NDArray[np.int64], head_dim: int) -> NDArray[np.float64]:
    """Log-probabilities of one prompt `[positions, vocabulary]`."""
    feeds: dict[str, NDArray] = {}
    for item in session.get_inputs():
        if item.name == "input_ids":
            feeds[item.name] = row[None]
        elif item.name == "attention_mask":
            feeds[item.name] = np.ones((1, len(row)), np.int64)
        elif item.name == "position_ids":
            feeds[item.name] = np.arange(len(row))[None]
        else:
            width = item.shape[3] if isinstance(item.shape[3], int) else head_dim
            feeds[item.name] = np.zeros((1, item.shape[1], 0, width), _TYPES[item.type])
    return log_softmax(session.run(["logits"], feeds)[0][0])


def judge(
    folder: Path, rows: list[NDArray[np.int64]], truth: list[NDArray[np.float64]], head_dim: int, threads: int
) -> dict[str, Any]:
    """KL in nats per token with standard error over rows, top-1 agreement, bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    models = sorted(folder.rglob("*.onnx"))
    session = onnxruntime.InferenceSession(str(models[0]), options, providers=["CPUExecutionProvider"])
    divergence, same = [], []
    for row, p in zip(rows, truth, strict=True):
        q = answers(session, row, head_dim)[:, : p.shape[1]]
        divergence.append(float((np.exp(p) * (p - q)).sum(-1).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).mean()))
    return {
        "folder": folder.name,
        "kl": float(np.mean(divergence)),
        "standard_error": float(np.std(divergence) / np.sqrt(len(divergence))),
        "top1": float(np.mean(same)),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*.onnx*")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx.judge", description=__doc__)
    parser.add_argument("original", type=Path, help="the 16-bit checkpoint's folder")
    parser.add_argument("folders", type=Path, nargs="+", help="ONNX folders of any tool")
    parser.add_argument("--text", type=Path, default=_TEXT, help="JSONL with a `text` in each line")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    rows = rows_of(given.original, given.text, given.tokens, given.window)
    truth = originals(given.original, rows)
    head_dim = json.loads((given.original / "config.json").read_text(encoding="utf-8"))["head_dim"]
    for folder in given.folders:
        print(json.dumps(judge(folder, rows, truth, head_dim, given.threads)), flush=True)


if __name__ == "__main__":
    main()
