"""Marks for tests that need a feature of the processor."""

from __future__ import annotations

import pytest
import torch

needs_avx2 = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx2"), reason="needs a processor with AVX2: integers are multiplied with it"
)
