"""Which of ggml's types a search tries for a row of so many inputs."""

from __future__ import annotations

import pytest

from qwen3_export.core.qwen3 import parse_config
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.errors import RecipeError
from qwen3_export.solve.mixed_precision.candidates import fitting, schemes
from qwen3_export.solve.mixed_precision.units import Unit, units
from tests.conftest import tiny_config

SHORT, WIDE = ("iq4_nl", "q4_1", "q5_0", "q5_1"), ("q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")


def names(found: list[QuantScheme | None]) -> list[str | None]:
    return [scheme and (scheme.ggml_type or scheme.label) for scheme in found]


def of_width(inputs: int) -> Unit:
    config = parse_config(tiny_config(hidden_size=inputs), "test")
    return next(unit for unit in units(config, True, False) if "qkv" in unit.match or "q_proj" in unit.match)


@pytest.mark.parametrize(("inputs", "wanted"), [(160, SHORT), (224, SHORT), (256, WIDE), (512, WIDE)])
def test_blocks_of_32_are_for_rows_that_256_does_not_divide(inputs: int, wanted: tuple[str, ...]) -> None:
    assert names(fitting(of_width(inputs), schemes(["gguf"], None))) == [*wanted, "w8-g32-sym"]


def test_what_fits_no_row_is_said() -> None:
    with pytest.raises(RecipeError, match="no candidate fits its 160 inputs") as caught:
        fitting(of_width(160), schemes(["gguf"], [2, 3]))
    assert "of 32 with 4, 5 and 8 bits" in (caught.value.hint or "")
