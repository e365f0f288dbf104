"""How many bytes of experts' running weights are kept in memory.

They stand apart from what uses them, so that an estimate of memory needs no torch.
"""

from __future__ import annotations

# A layer whose running weights are no more than this stays in memory; of a larger one, a window does.
RESIDENT_BYTES, WINDOW_BYTES = 1536 << 20, 512 << 20
