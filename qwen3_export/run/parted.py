"""An ONNX folder run part by part.

Memory grows with a part, not with the model. A part takes all tokens of all streams before the next one is opened, so
weights are read once or twice in all. What goes from part to part are hidden states; logits come in pieces of the
vocabulary. `run.graph_parts` cuts the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.memory import lacks_memory, out_of_memory
from qwen3_export.core.process import trim_heap
from qwen3_export.core.processors import thread_count
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.run.exact_graph import kernels, without_rounding
from qwen3_export.run.graph_parts import GraphParts, Part
from qwen3_export.run.onnx_files import find_onnx
from qwen3_export.run.ort import onnxruntime_for
from qwen3_export.run.ort_settings import session_settings
from qwen3_export.run.ort_words import reason_of
from qwen3_export.run.session import check_ids, check_logits

# Values of one call by name, in ONNX Runtime's memory.
Values = dict[str, Any]


@dataclass
class Stream:
    """Sequences on their way through the parts.

    `sequences` holds the values of each call of each sequence, `rows` their batch sizes, `caches` what the last part
    has left of each. `exact`: codes are multiplied with activations that nothing has rounded.
    """

    exact: bool
    sequences: list[list[Values]]
    rows: list[int]
    caches: list[Values]


class PartedModel:
    """One of our ONNX folders, of which one part is open at a time.

    `threads` compute, by default as many as there are processors.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        onnxruntime, self._threads = onnxruntime_for(folder), thread_count(threads)
        self._runtime, self._folder, self._path = onnxruntime, folder, find_onnx(folder).graph
        self.graph = GraphParts(self._path)
        self.vocab_size, self.context = self.graph.vocab_size, int(self.graph.metadata["qwen3_export.context"])

    def stream(self, sequences: Sequence[Sequence[NDArray]], exact: bool = False) -> Stream:
        """A stream of sequences, each given as its calls: a prompt, then decoded tokens.

        A call is token ids `[tokens]`, or `[rows, tokens]` for a batch whose rows run together.
        """
        rows = [len(np.atleast_2d(calls[0])) for calls in sequences]
        return Stream(exact, [self._calls(calls) for calls in sequences], rows, [{} for _ in sequences])

    def logits(self, *streams: Stream) -> Iterator[list[list[NDArray[np.float32]]]]:
        """Logits `[tokens, words]` of each sequence of each stream.

        A batch's rows stand behind each other. One piece of the vocabulary comes after another.
        """
        name, where = self.graph.logits, f"{self._folder.name} in onnxruntime"
        for part in self._passed(self.graph.parts, streams):
            if name in part.gives:
                found = [[_joined(calls, name) for calls in stream.sequences] for stream in streams]
                yield [[check_logits(logits, where) for logits in sequences] for sequences in found]

    def caches(self, stream: Stream) -> Iterator[dict[str, list[NDArray]]]:
        """Keys and values after the last call, part after part.

        They are by the name of the input, `[kv_heads, tokens, head_dim]` of each sequence.
        """
        logits, parts = self.graph.logits, self.graph.parts
        last = max(i for i, part in enumerate(parts) if part.caches)
        wanted = [replace(part, gives=[name for name in part.gives if name != logits]) for part in parts[: last + 1]]
        for part in self._passed(wanted, [stream]):
            yield {name: [held[name].numpy()[0] for held in stream.caches] for name in part.caches}

    def _passed(self, parts: Sequence[Part], streams: Sequence[Stream]) -> Iterator[Part]:
        """Every part, after all streams have passed it."""
        for i, part in enumerate(parts):
            if part.rows is not None:
                # A head's row takes every token for itself: tokens that were decoded one by one share its products.
                for stream in streams:
                    stream.sequences = [self._as_one_call(calls, part.needs) for calls in stream.sequences]
            self._pass(part, streams)
            yield part
            later = {name for other in parts[i + 1 :] for name in other.needs}
            for values in (values for stream in streams for calls in stream.sequences for values in calls):
                for name in values.keys() - later:
                    del values[name]

    def _calls(self, calls: Sequence[NDArray]) -> list[Values]:
        batches, found, past = [np.atleast_2d(ids) for ids in calls], [], 0
        for row in np.concatenate(batches, axis=1):
            check_ids(self, self._folder, row, 0)
        for ids in batches:
            rows, total = len(ids), past + ids.shape[1]
            values = {
                "input_ids": ids.astype(np.int64),
                "attention_mask": np.ones((rows, total), np.int64),
                "position_ids": np.tile(np.arange(past, total), (rows, 1)),
            }
            found.append({name: self._runtime.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()})
            past = total
        return found

    def _as_one_call(self, calls: list[Values], names: Sequence[str]) -> list[Values]:
        """Hidden states of all calls of a sequence, behind each other."""
        if len(calls) == 1:
            return calls
        joined = {name: np.concatenate([values[name].numpy() for values in calls], axis=1) for name in names}
        return [{name: self._runtime.OrtValue.ortvalue_from_numpy(array) for name, array in joined.items()}]

    def _pass(self, part: Part, streams: Sequence[Stream]) -> None:
        """Run a part for all calls, and add what it gives to their values."""
        first = streams[0].sequences[0][0]
        types = {name: (first[name].element_type(), len(first[name].shape())) for name in part.needs}
        model = self.graph.model(part, types)
        plain = without_rounding(model)
        # ONNX Runtime makes rounding products of DequantizeLinear and MatMul on its own.
        rounds = plain != model or any(node.op_type == "DequantizeLinear" for node in part.nodes)
        together = {kind: [s for s in streams if (s.exact or not rounds) == kind] for kind in (False, True)}
        jobs = [(model if not kind else plain, kind, found) for kind, found in together.items() if found]
        # Making a session packs weights in one thread; two at once take twice the memory.
        beside = len(jobs) > 1 and self._threads > 1 and self.graph.is_small(part)
        threads = self._threads // 2 if beside else self._threads

        def work(job: tuple[bytes, bool, list[Stream]]) -> None:
            graph, exact, found = job
            # Packing a piece of the head takes longer than its few products gain by it.
            settings = self._settings(exact, threads, packs=rounds or part.rows is None)
            with kernels(graph, exact):
                session = self._runtime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
            for stream in found:
                self._run(session, part, stream)
            del session
            trim_heap()

        with self._errors_named(), ThreadPoolExecutor(2 if beside else 1) as pool:
            list(pool.map(work, jobs))

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Raise what ONNX Runtime raises as an error of ours."""
        try:
            yield
        except Exception as error:  # onnxruntime's errors share no public base below Exception
            if lacks_memory(error):
                raise out_of_memory(self._path, error) from error
            reason = reason_of(error)
            if "NOT_IMPLEMENTED" in str(error):
                raise MissingRuntimeError(
                    f"{self._folder}: ONNX Runtime has no kernel for it on this device ({reason})",
                    "export with --precision fp32, or run it where bf16 is supported",
                ) from error
            raise InputError(f"{self._folder}: ONNX Runtime cannot run {self._path.name} ({reason})") from error

    def _run(self, session: Any, part: Part, stream: Stream) -> None:
        wanted = [*part.gives, *part.caches.values()]
        for i, calls in enumerate(stream.sequences):
            held = {name: self._empty(name, stream.rows[i]) for name in part.caches}
            for values in calls:
                outputs = session.run_with_ort_values(wanted, {name: values[name] for name in part.needs} | held)
                values.update(zip(part.gives, outputs, strict=False))
                held = dict(zip(part.caches, outputs[len(part.gives) :], strict=True))
            stream.caches[i] = held

    def _empty(self, name: str, rows: int) -> Any:
        """A cache without tokens."""
        kind, sizes = self.graph.inputs[name].type.tensor_type, {"batch_size": rows, "past_sequence_length": 0}
        shape = [sizes.get(axis.dim_param, axis.dim_value) for axis in kind.shape.dim]
        return self._runtime.OrtValue.ortvalue_from_shape_and_type(shape, kind.elem_type)

    def _settings(self, exact: bool, threads: int, packs: bool) -> Any:
        entries = {} if packs else {"disable_prepacking": "1"}
        settings = session_settings(self._runtime, self._path, threads, exact, data=True, **entries)
        # An arena keeps what it has grown to, and a pattern is one piece as large as all activations together, whose
        # place in the heap smaller ones take: 0.5 GB of freed memory, where 0.1 GB was ever in use.
        settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
        return settings


def _joined(calls: Sequence[Values], name: str) -> NDArray[np.float32]:
    """One value of all calls of a sequence, `[tokens, …]`, dropped from the calls."""
    found = [values.pop(name).numpy() for values in calls]
    whole = found[0] if len(found) == 1 else np.concatenate(found, axis=1)
    return whole.reshape(-1, whole.shape[-1]).astype(np.float32, copy=False)
