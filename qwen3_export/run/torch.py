"""A Hugging Face folder, 16-bit or quantized, in our own torch forward pass.

Quantized matrices are dequantized to fp32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.process import sleeping_threads, uninterrupted
from qwen3_export.core.processors import processors, thread_count
from qwen3_export.errors import MissingRuntimeError
from qwen3_export.run.session import RuntimeOptions, check_ids


class TorchSession:
    """See `run.session.Session`."""

    runtime = "torch"
    device = "cpu"

    def __init__(self, folder: Path, options: RuntimeOptions) -> None:
        checkpoint = open_checkpoint(folder)
        try:
            with uninterrupted(), sleeping_threads():
                import torch
                from qwen3_export.model.decoder import Decoder
        except ImportError as error:
            raise MissingRuntimeError(
                f"{folder}: running a Hugging Face folder needs torch", "pip install 'qwen3-export[solve]'"
            ) from error
        wanted = thread_count(options.threads) if options.threads else min(processors(), torch.get_num_threads())
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)
        self.version = str(torch.__version__)
        self.threads = torch.get_num_threads()
        self.vocab_size = checkpoint.config.vocab_size
        self.context = checkpoint.config.max_position
        self._decoder = Decoder(checkpoint)
        self._caches, self._length, self._folder = self._decoder.new_caches(), 0, folder

    def prefill(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Start a new sequence; logits `[len(ids), vocab]`."""
        self._caches, self._length = self._decoder.new_caches(), 0
        return self._run(ids)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits `[vocab]`."""
        return self._run(np.array([token], np.int32))[0]

    def _run(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        check_ids(self, self._folder, ids, self._length)
        self._length += len(ids)
        return self._decoder.logits(self._decoder.hidden([ids], [self._caches])[0]).numpy()

    def close(self) -> None:
        """Does nothing: all memory belongs to this object."""
