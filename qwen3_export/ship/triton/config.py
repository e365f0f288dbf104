"""The text of config.pbtxt, Triton's description of a model (protobuf `inference.ModelConfig`)."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3_export.errors import InputError

# A client's inputs; names and types are those of Triton's vllm backend, so that one client can use both.
INPUTS = (
    ("text_input", "TYPE_STRING", False),
    ("messages", "TYPE_STRING", True),
    ("sampling_parameters", "TYPE_STRING", True),
    ("stream", "TYPE_BOOL", True),
    ("thinking", "TYPE_BOOL", True),
    ("exclude_input_in_output", "TYPE_BOOL", True),
)
OUTPUTS = (("text_output", "TYPE_STRING"), ("finish_reason", "TYPE_STRING"), ("num_output_tokens", "TYPE_UINT32"))
_MOST_INSTANCES, _MOST_SEQUENCES, _LONGEST_QUEUE = 64, 1024, 100_000


@dataclass(frozen=True)
class Serving:
    """Settings of serving: copies of the model, their threads, length of the queue.

    `sequences` are answers that a copy decodes together; None takes what the artifact's runtime can.
    """

    instances: int = 1
    threads: int | None = None
    sequences: int | None = None
    queue: int = 64

    def __post_init__(self) -> None:
        """Raise InputError for numbers out of range."""
        bounds: tuple[tuple[str, int | None, int], ...] = (
            ("instances", self.instances, _MOST_INSTANCES),
            ("sequences", self.sequences, _MOST_SEQUENCES),
            ("queue", self.queue, _LONGEST_QUEUE),
        )
        for key, value, most in bounds:
            if value is not None and not 1 <= value <= most:
                raise InputError(f"--{key} {value}: a number from 1 to {most} was expected")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise InputError(f"--threads {self.threads}: a number from 1 to 1024 was expected")


def python_config(name: str, artifact: str, serving: Serving, sequences: int, device: str | None = None) -> str:
    """For the python backend: streaming, continuous batching, a bounded queue.

    Sequences join and leave a batch at every token, inside the backend (`run.serving`). Triton's own batcher is turned
    off with `max_batch_size: 0`, since it waits for requests of one shape and returns them together. When the queue is
    full, a request is refused at once. With a `device` the instances run on the first GPU.
    """
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 0"]
    lines += ["model_transaction_policy { decoupled: true }"]
    lines += [_tensor("input", key, kind, optional) for key, kind, optional in INPUTS]
    lines += [_tensor("output", key, kind) for key, kind in OUTPUTS]
    place = "kind: KIND_CPU" if device is None else "kind: KIND_GPU, gpus: [ 0 ]"
    lines += [f"instance_group [ {{ count: {serving.instances}, {place} }} ]"]
    values = {
        "artifact": artifact,
        "sequences": str(sequences),
        "queue": str(serving.queue),
        "threads": str(serving.threads or 0),
        "device": device or "",
    }
    lines += [f'parameters {{ key: "{key}", value {{ string_value: "{value}" }} }}' for key, value in values.items()]
    return "\n".join(lines) + "\n"


def vllm_config(name: str) -> str:
    """For Triton's vllm backend, which fills in inputs and outputs, batches continuously, and streams."""
    lines = [f'name: "{name}"', 'backend: "vllm"', "model_transaction_policy { decoupled: true }"]
    return "\n".join([*lines, "instance_group [ { count: 1, kind: KIND_MODEL } ]"]) + "\n"


def _tensor(field: str, name: str, kind: str, optional: bool = False) -> str:
    more = ", optional: true" if optional else ""
    return f'{field} [ {{ name: "{name}", data_type: {kind}, dims: [ 1 ]{more} }} ]'
