"""The original's answers, computed from its checkpoint block by block.

Of `prove`, only this module and `explain` need torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.outputs import staged_file
from qwen3_export.core.process import sleeping_threads, uninterrupted
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.core.tensorfile import TensorFileWriter
from qwen3_export.core.tokenizer_files import has_tokenizer
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.prove.generation import MODES, Chats, ended
from qwen3_export.prove.reference import Continuations, Truth, answer_specs, file_metadata, full_truth, top_of
from qwen3_export.prove.sidecars import read_sidecars
from qwen3_export.prove.tasks import Task, solve, tasks_sha256
from qwen3_export.run.session import RuntimeOptions, check_logits
from qwen3_export.run.thinking import Thought, thinking_budget
from qwen3_export.text.documents import load_documents
from qwen3_export.text.samples import Samples
from qwen3_export.text.tokenizer import ModelTokenizer, chat_text

if TYPE_CHECKING:
    from qwen3_export.model.decoder import Decoder

# Most likely tokens kept per position, unless told otherwise.
TOP_K = 256
PROMPT_TOKENS, NEW_TOKENS, PROMPTS, CHATS = 32, 32, 8, 4


class LiveReference:
    """A reference computed from the original itself.

    It holds the last hidden states, and computes a row's logits when they are asked for: those of a whole text are too
    large for memory.
    """

    is_lower_bound = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Samples,
        progress: Progress | None = None,
        budget_tokens: int | None = None,
    ) -> None:
        try:
            with uninterrupted(), sleeping_threads():
                from qwen3_export.model.decoder import Decoder
                from qwen3_export.model.workers import workers
        except ImportError as error:
            raise MissingRuntimeError(
                "computing the original's logits needs torch",
                "pip install 'qwen3-export[solve]', or give --reference FILE made on another machine",
            ) from error
        progress = progress or Progress()
        self.samples, self.vocab_size = samples, checkpoint.config.vocab_size
        if max(int(ids.max()) for ids in samples.ids) >= self.vocab_size:
            raise InputError(f"{checkpoint.folder}: the tokenizer has more tokens than the model's vocabulary")
        self.checkpoint, self.source_sha256, self._folder = checkpoint, checkpoint.sha256, checkpoint.folder
        self.sidecars = read_sidecars(checkpoint.folder) if has_tokenizer(checkpoint.folder) else None
        with workers() as pool:
            self._decoder = Decoder(checkpoint, pool)
            with progress.bar(f"original {checkpoint.name}", checkpoint.config.num_layers) as tick:
                self._hidden = self._decoder.hidden(samples.ids, tick=tick)
            questions = _questions(checkpoint, budget_tokens)
            self.continuations, self.chats = _texts(self._decoder, _prompts(samples), questions, progress)

    def logits(self, row: int) -> NDArray[np.float32]:
        """fp32 logits `[tokens, vocab]` of one row."""
        return check_logits(self._decoder.logits(self._hidden[row]).numpy(), "the original model")

    def tasks_right(self, tasks: Sequence[Task], progress: Progress | None = None) -> list[bool]:
        """Whether the original gets each task right."""
        from qwen3_export.run.torch import TorchSession

        session = TorchSession(self._folder, RuntimeOptions())
        try:
            return solve(session, ModelTokenizer(self._folder), tasks, "the original", progress)
        finally:
            session.close()

    def truth(self, row: int) -> Truth:
        """The original's full distributions over one row."""
        return full_truth(self.logits(row), self.samples.ids[row])


def _prompts(samples: Samples) -> tuple[NDArray[np.int32], ...]:
    """Prompts: the first tokens of some rows, spread evenly over the text."""
    count = min(PROMPTS, len(samples.ids))
    chosen = np.linspace(0, len(samples.ids) - 1, count).astype(int)
    return tuple(samples.ids[i][:PROMPT_TOKENS] for i in chosen)


def _questions(checkpoint: Checkpoint, budget_tokens: int | None) -> Chats | None:
    """Questions of the held-out chats, rendered in both modes; None without a template."""
    if not has_tokenizer(checkpoint.folder):
        return None
    tokenizer = ModelTokenizer(checkpoint.folder)
    if tokenizer.template is None:
        if budget_tokens is not None:
            raise InputError(f"--thinking-budget: {checkpoint.name} has no chat template", "leave it away")
        return None
    asked = [document.content[:1] for document in load_documents("heldout") if isinstance(document.content, list)]
    asked = [asked[i] for i in np.linspace(0, len(asked) - 1, CHATS).astype(int)]
    prompts = {}
    for mode, thinking in MODES.items():
        texts = [chat_text(tokenizer, chat, generate=True, thinking=thinking) for chat in asked]
        prompts[mode] = tuple(tuple(int(i) for i in tokenizer.encode(text)) for text in texts)
    stops = tuple(sorted(stop for stop in tokenizer.stop_ids() if 0 <= stop < checkpoint.config.vocab_size))
    budget = thinking_budget(tokenizer, budget_tokens)
    count = NEW_TOKENS if budget is None else budget.tokens + len(budget.cut) + NEW_TOKENS
    room = checkpoint.config.max_position - max(len(ids) for rows in prompts.values() for ids in rows)
    if room < 1:
        return None
    return Chats(prompts, {}, stops, min(count, room), budget)


def _texts(
    decoder: Decoder, prompts: tuple[NDArray[np.int32], ...], questions: Chats | None, progress: Progress
) -> tuple[Continuations, Chats | None]:
    """Generate the original's greedy texts, all prompts in step.

    So every block is read once per token, not once per token and prompt.
    """
    rows = [np.asarray(ids, np.int32) for ids in prompts]
    thoughts: list[Thought | None] = [None] * len(rows)
    for mode in MODES if questions else ():
        assert questions is not None
        rows += [np.asarray(ids, np.int32) for ids in questions.prompts[mode]]
        thoughts += [Thought(questions.budget if MODES[mode] else None) for _ in questions.prompts[mode]]
    count = max(NEW_TOKENS, questions.new_tokens) if questions else NEW_TOKENS
    with progress.bar("texts of the original", count) as tick:
        stops = set(questions.stops) if questions else set()
        texts = _continued(decoder, rows, thoughts, stops, count, tick)
    plain = Continuations(prompts, np.array([text[:NEW_TOKENS] for text in texts[: len(prompts)]], np.int32))
    if questions is None:
        return plain, None
    each = iter(texts[len(prompts) :])
    answers = {
        mode: tuple(ended(next(each)[: questions.new_tokens], questions.stops) for _ in questions.prompts[mode])
        for mode in MODES
    }
    return plain, replace(questions, answers=answers)


def _continued(
    decoder: Decoder,
    rows: list[NDArray[np.int32]],
    thoughts: list[Thought | None],
    stops: set[int],
    count: int,
    tick: Callable[[], object],
) -> list[list[int]]:
    import torch

    caches, texts = [decoder.new_caches() for _ in rows], [list[int]() for _ in rows]
    for _ in range(count):
        last = torch.cat([state[-1:] for state in decoder.hidden(rows, caches)])
        chosen = [int(token) for token in decoder.logits(last).argmax(-1)]
        for text, thought, token in zip(texts, thoughts, chosen, strict=True):
            text.append(thought.follow(token, stops) if thought else token)
        rows = [np.array([text[-1]], np.int32) for text in texts]
        tick()
    return texts


def write_reference(
    checkpoint: Checkpoint,
    samples: Samples,
    output: Path,
    top_k: int,
    force: bool,
    progress: Progress | None = None,
    budget_tokens: int | None = None,
    tasks: Sequence[Task] = (),
) -> dict[str, Any]:
    """Write the portable reference file; returns what it holds.

    `top_k` 0 keeps all logits; `budget_tokens` limits the thoughts of chats; of `tasks` the file says which ones the
    original gets right.
    """
    with staged_file(output, force, [checkpoint.folder]) as partial:
        live = LiveReference(checkpoint, samples, progress, budget_tokens)
        right = live.tasks_right(tasks, progress) if tasks else []
        positions = sum(len(ids) - 1 for ids in samples.ids)
        domains = sorted(set(samples.domains))
        head, specs = _head(live, domains), answer_specs(positions, top_k, live.vocab_size)
        all_specs = {**{name: (array.dtype, array.shape) for name, array in head.items()}, **specs}
        metadata = file_metadata(
            {
                "source": checkpoint.name,
                "source_sha256": checkpoint.sha256,
                "vocab_size": live.vocab_size,
                "top_k": top_k,
                "rows_sha256": samples.sha256,
                **({"sidecars": live.sidecars.to_json()} if live.sidecars else {}),
                "tasks": json.dumps({"sha256": tasks_sha256(tasks), "right": right} if tasks else None),
                "chats": json.dumps(live.chats.to_dict() if live.chats else None),
            },
            domains,
        )
        with TensorFileWriter(partial, all_specs, metadata) as writer:
            for name, array in head.items():
                writer.write(name, array)
            _write_answers(writer, live, top_k, positions, progress or Progress())
    return {
        "output": str(output),
        "source_sha256": checkpoint.sha256,
        "tokens": samples.tokens,
        "positions": positions,
        "rows": len(samples.ids),
        "domains": domains,
        "top_k": top_k,
        "bytes": output.stat().st_size,
        "sha256": sha256_file(output),
        "tasks": len(tasks),
        "tasks_right": sum(right),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _head(live: LiveReference, domains: list[str]) -> dict[str, NDArray]:
    samples, text = live.samples, live.continuations
    return {
        "tokens": np.concatenate(samples.ids).astype(np.int32),
        "row_lengths": np.array([len(ids) for ids in samples.ids], np.int32),
        "row_domains": np.array([domains.index(domain) for domain in samples.domains], np.int32),
        "prompts": np.concatenate(text.prompts).astype(np.int32),
        "prompt_lengths": np.array([len(ids) for ids in text.prompts], np.int32),
        "continuations": text.tokens,
    }


def _write_answers(
    writer: TensorFileWriter, live: LiveReference, top_k: int, positions: int, progress: Progress
) -> None:
    samples = live.samples
    rows = range(len(samples.ids))
    with progress.bar("answers", len(rows)) as tick:
        if top_k == 0:
            with writer.pieces("logits") as write:
                for row in rows:
                    write(live.logits(row)[:-1])
                    tick()
            return
        parts: Mapping[str, list[NDArray]] = {name: [] for name in answer_specs(positions, top_k, live.vocab_size)}
        for row in rows:
            for name, array in top_of(live.truth(row), top_k, samples.ids[row]).items():
                parts[name].append(array)
            tick()
    for name, arrays in parts.items():
        writer.write(name, np.concatenate(arrays))
