"""Asks a tritonserver over HTTP and gRPC, and prints its answers as JSON.

client.py HTTP GRPC MODEL REPOSITORY TOKENS    in the server's environment
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from client_questions import DRAWN, QUESTIONS  # this script's own folder comes first in the path
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

HTTP, GRPC, MODEL, REPOSITORY = sys.argv[1:5]
TOKENS = int(sys.argv[5])


def post(path: str, body: object) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://{HTTP}/v2/models/{MODEL}/{path}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def asked(question: str, **more: object) -> dict[str, object]:
    sampling = json.dumps({"max_tokens": TOKENS})
    return {"text_input": question, "sampling_parameters": sampling, "thinking": False, **more}


def tensor(name: str, value: object, kind: str) -> triton.InferInput:
    found = triton.InferInput(name, [1], kind)
    found.set_data_from_numpy(np.array([value], object if kind == "BYTES" else bool))
    return found


def stream(question: str, stop_after: int | None = None) -> dict[str, object]:
    """One streamed answer over gRPC, cancelled after `stop_after` pieces if given."""
    answers: queue.Queue = queue.Queue()
    client = triton.InferenceServerClient(GRPC)
    client.start_stream(lambda result, error: answers.put((result, error)))
    sampling = json.dumps({"max_tokens": 2000 if stop_after else TOKENS}).encode()
    inputs = [
        tensor("text_input", question.encode(), "BYTES"),
        tensor("sampling_parameters", sampling, "BYTES"),
        tensor("stream", True, "BOOL"),
        tensor("thinking", False, "BOOL"),
    ]
    client.async_stream_infer(MODEL, inputs)
    pieces, reason, failure = [], "", None
    while True:
        result, error = answers.get(timeout=60)
        if error is not None:
            failure = str(error)
            break
        pieces.append(result.as_numpy("text_output")[0].decode())
        reason = result.as_numpy("finish_reason")[0].decode()
        if stop_after and len(pieces) == stop_after:
            client.stop_stream(cancel_requests=True)
            return {"text": "".join(pieces), "pieces": len(pieces), "reason": reason}
        if reason:
            break
    client.stop_stream()
    return {"text": "".join(pieces), "pieces": len(pieces), "reason": reason, "error": failure}


def main() -> None:
    config = text_format.Parse(Path(REPOSITORY, MODEL, "config.pbtxt").read_text(), ModelConfig())
    found: dict[str, object] = {"backend": config.backend, "decoupled": config.model_transaction_policy.decoupled}
    found["generate"] = post("generate", asked(QUESTIONS[0]))
    found["stream"] = post("generate_stream", asked(QUESTIONS[0], stream=True))
    found["stream without its path"] = post("generate", asked(QUESTIONS[0], stream=True))
    found["chat"] = post("generate", asked("", messages=json.dumps([{"role": "user", "content": QUESTIONS[0]}])))
    with ThreadPoolExecutor(8) as pool:
        found["together"] = [json.loads(text) for _, text in pool.map(lambda q: post("generate", asked(q)), QUESTIONS)]
    for name, (thinking, sampling) in DRAWN.items():
        drawn = json.dumps({"max_tokens": TOKENS, **sampling})
        found[name] = post("generate", asked(QUESTIONS[0], sampling_parameters=drawn, thinking=thinking))
    # What `run` does without options: it thinks.
    found["plain"] = post("generate", {"text_input": QUESTIONS[0]})
    found["grpc"] = stream(QUESTIONS[0])
    found["cancelled"] = stream(QUESTIONS[1], stop_after=2)
    found["after"] = post("generate", asked(QUESTIONS[0]))
    bad = [
        {"text_input": ""},
        {"text_input": "x", "sampling_parameters": "{"},
        {"text_input": "x", "sampling_parameters": '{"max_tokens": -1}'},
        {"text_input": "x", "sampling_parameters": '{"beams": 4}'},
        {"text_input": "word " * 100_000},
        {"messages": "[]", "text_input": ""},
        {"messages": json.dumps([{"role": "robot", "content": "x"}]), "text_input": ""},
        {"messages": json.dumps([{"role": "user", "content": None}]), "text_input": ""},
        {"other": 1},
    ]
    found["bad"] = [post("generate", body) for body in bad] + [post("generate", b"no JSON")]
    found["flood"] = flood()
    print(json.dumps(found))


def flood() -> dict[str, int]:
    """Send more requests than may wait; numbers of answered and refused ones."""
    counts, lock = {"answered": 0, "busy": 0, "other": 0}, threading.Lock()

    def one(number: int) -> None:
        code, text = post("generate", asked(QUESTIONS[number % 8]))
        with lock:
            counts["answered" if code == 200 else "busy" if "busy" in text else "other"] += 1

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one, range(32)))
    return counts


if __name__ == "__main__":
    main()
