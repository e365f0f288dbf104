"""The python backend's model: one artifact, streamed answers, a bounded queue.

This file is copied into a repository beside a copy of the package, and runs inside Triton's Python stub.

    text_input           a user's message; ignored if there are `messages`
    messages             JSON: a whole chat in the form of the chat template, instead of text_input
    sampling_parameters  JSON: max_tokens, temperature, top_p, seed
    stream               true: one response for each piece of text; false: one response with all of it
    thinking             the chat template's switch
"""

from __future__ import annotations

import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

sys.path.insert(0, str(Path(__file__).resolve().parent))

from qwen3_export.errors import ExportError, InputError
from qwen3_export.run import limits
from qwen3_export.run.artifact import open_session, tokenizer_of
from qwen3_export.run.generate import Sampling
from qwen3_export.run.serving import Chat, Server
from qwen3_export.run.session import RuntimeOptions
from qwen3_export.text.messages import read_chat

_FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# Names of vLLM's sampling parameters, ours, and their limits.
_SAMPLING = {
    "max_tokens": ("max_new_tokens", limits.MAX_NEW_TOKENS),
    "temperature": ("temperature", limits.TEMPERATURE),
    "top_p": ("top_p", limits.TOP_P),
    "seed": ("seed", limits.SEED),
}


class CancelledError(Exception):
    """The client no longer wants the answer."""


class TritonPythonModel:
    """See Triton's python backend: `initialize`, `execute` with decoupled responses, `finalize`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artifact and start the thread that answers."""
        values = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        self._name, self._most = args["model_name"], int(values["queue"])
        artifact = Path(__file__).resolve().parent / values["artifact"]
        options = RuntimeOptions(threads=int(values["threads"]) or None, device=values["device"] or None)
        self._session = open_session(artifact, options)
        tokenizer = tokenizer_of(artifact, self._session)
        self._server = Server(self._session, tokenizer, self._name, int(values["sequences"]), self._most)

    def execute(self, requests: list[Any]) -> None:
        """Queue requests; a full queue refuses at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._server.submit(_chat(request, sender))
            except queue.Full:
                _fail(sender, f"{self._name} is busy: {self._most} requests are waiting", "UNAVAILABLE")
            except InputError as error:
                _fail(sender, str(error), "INVALID_ARG")

    def finalize(self) -> None:
        """Answer what is queued, and free the model."""
        self._server.close()
        self._session.close()


def _chat(request: Any, sender: Any) -> Chat:
    """A request as a chat whose answer goes to `sender`.

    Raises InputError where it cannot be read.
    """
    asked = _read(request)

    def on_text(text: str) -> None:
        if sender.is_cancelled():
            raise CancelledError
        if asked["stream"] and text:
            sender.send(_response(text, "", 0))

    def on_end(found: dict[str, Any]) -> None:
        reason = "stop" if found["stop"] == "end" else found["stop"]
        sender.send(_response("" if asked["stream"] else found["text"], reason, found["new_tokens"]), flags=_FINAL)

    def on_error(error: Exception) -> None:
        if isinstance(error, CancelledError):
            _fail(sender, "the request was cancelled", "CANCELLED")
        elif isinstance(error, ExportError):
            _fail(sender, str(error), "INVALID_ARG")
        else:
            _fail(sender, f"{type(error).__name__}: {error}", "INTERNAL")

    return Chat(asked["messages"], asked["thinking"], asked["sampling"], on_text, on_end, on_error)


def _read(request: Any) -> dict[str, Any]:
    """What a request asks for; InputError where it cannot be."""
    messages = _json(request, "messages", list)
    if messages is None:
        text = _text(request, "text_input")
        if not text or not text.strip():
            raise InputError("text_input is empty")
        messages = [{"role": "user", "content": text}]
    messages = read_chat(messages)
    sampling: dict[str, Any] = {}
    for key, value in (_json(request, "sampling_parameters", dict) or {}).items():
        if key not in _SAMPLING:
            raise InputError(f"sampling_parameters: unknown {key!r}; known are {', '.join(_SAMPLING)}")
        name, limit = _SAMPLING[key]
        number: Any = float(value) if limit.kind is float and type(value) is int else value
        if type(number) is not limit.kind or not limit.least <= number <= limit.most:
            raise InputError(
                f"sampling_parameters: {key} is {value!r}; {limit.kind.__name__} from {limit.least} to {limit.most} "
                "expected"
            )
        sampling[name] = number
    return {
        "messages": messages,
        "sampling": Sampling(**sampling),
        "stream": _flag(request, "stream", False),
        "thinking": _flag(request, "thinking", True),
    }


def _value(request: Any, name: str) -> Any:
    tensor = pb.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    return values[0] if values.size else None


def _text(request: Any, name: str) -> str | None:
    value = _value(request, name)
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8") from error


def _json(request: Any, name: str, kind: type) -> Any:
    text = _text(request, name)
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no JSON ({error})") from error
    if not isinstance(value, kind):
        raise InputError(f"{name}: a JSON {'list' if kind is list else 'object'} was expected")
    return value


def _flag(request: Any, name: str, default: bool) -> bool:
    value = _value(request, name)
    return default if value is None else bool(value)


def _response(text: str, reason: str, count: int) -> Any:
    return pb.InferenceResponse(
        output_tensors=[
            pb.Tensor("text_output", np.array([text.encode()], dtype=object)),
            pb.Tensor("finish_reason", np.array([reason.encode()], dtype=object)),
            pb.Tensor("num_output_tokens", np.array([count], dtype=np.uint32)),
        ]
    )


def _fail(sender: Any, message: str, code: str) -> None:
    error = pb.TritonError(message, getattr(pb.TritonError, code, pb.TritonError.INTERNAL))
    sender.send(pb.InferenceResponse(output_tensors=[], error=error), flags=_FINAL)
