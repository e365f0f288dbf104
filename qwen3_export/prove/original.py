"""The original's answers, computed from its checkpoint block by block. The only torch in `prove`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.manifest import sha256_file
from qwen3_export.core.outputs import staged_file
from qwen3_export.core.process import uninterrupted
from qwen3_export.core.progress import Progress, peak_rss_bytes
from qwen3_export.core.tensorfile import TensorFileWriter
from qwen3_export.errors import InputError, MissingRuntimeError
from qwen3_export.prove.reference import Continuations, Truth, answer_specs, file_metadata, full_truth, top_of
from qwen3_export.prove.sidecars import read_sidecars
from qwen3_export.run.session import check_logits
from qwen3_export.text.samples import Samples

PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 32, 32, 8


class LiveReference:
    """A reference whose last hidden states are in memory; logits are computed row by row on demand."""

    is_lower_bound = False

    def __init__(self, checkpoint: Checkpoint, samples: Samples, progress: Progress | None = None) -> None:
        try:
            with uninterrupted():
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
        self.source_sha256 = checkpoint.sha256
        has_tokenizer = (checkpoint.folder / "tokenizer.json").is_file()
        self.sidecars = read_sidecars(checkpoint.folder) if has_tokenizer else None
        with workers() as pool:
            self._decoder = Decoder(checkpoint, pool)
            with progress.bar(f"original {checkpoint.name}", checkpoint.config.num_layers) as tick:
                self._hidden = self._decoder.hidden(samples.ids, tick=tick)
            prompts = _prompts(samples)
            self.continuations = Continuations(
                prompts, np.stack(self._decoder.greedy(prompts, NEW_TOKENS)).astype(np.int32)
            )

    def logits(self, row: int) -> NDArray[np.float32]:
        """fp32 logits `[tokens, vocab]` of one row."""
        return check_logits(self._decoder.logits(self._hidden[row]).numpy(), "the original model")

    def truth(self, row: int) -> Truth:
        """The original's full distributions on one row."""
        return full_truth(self.logits(row), self.samples.ids[row])


def _prompts(samples: Samples) -> tuple[NDArray[np.int32], ...]:
    """The first tokens of some rows, spread evenly over the text."""
    count = min(PROMPTS, len(samples.ids))
    chosen = np.linspace(0, len(samples.ids) - 1, count).astype(int)
    return tuple(samples.ids[i][:PROMPT_TOKENS] for i in chosen)


def write_reference(
    checkpoint: Checkpoint, samples: Samples, output: Path, top_k: int, force: bool, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the portable reference file; `top_k` 0 keeps all logits. Returns what was written."""
    with staged_file(output, force, [checkpoint.folder]) as partial:
        live = LiveReference(checkpoint, samples, progress)
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
    samples = range(len(live.samples.ids))
    with progress.bar("answers", len(samples)) as tick:
        if top_k == 0:
            with writer.pieces("logits") as write:
                for row in samples:
                    write(live.logits(row)[:-1])
                    tick()
            return
        parts: Mapping[str, list[NDArray]] = {name: [] for name in answer_specs(positions, top_k, live.vocab_size)}
        for row in samples:
            for name, array in top_of(live.truth(row), top_k).items():
                parts[name].append(array)
            tick()
    for name, arrays in parts.items():
        writer.write(name, np.concatenate(arrays))
