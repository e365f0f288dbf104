"""Heat strips: one cell per layer, colored more strongly for a larger error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen3_export.prove.report.numbers import short
from qwen3_export.prove.report.svg import WIDTH, Chart, box, picture, text

_LEFT, _RIGHT = 130, 20
Named = Sequence[tuple[str, Mapping[str, Any]]]
Layers = Sequence[tuple[str, float]]


def hidden_state_strips(drifts: Named) -> Iterator[Chart]:
    """A strip per artifact with the error of its hidden states (`--explain`)."""
    traced = [(name, _layers(item)) for name, item in drifts]
    traced = [(name, layers) for name, layers in traced if layers]
    if not traced:
        return
    largest = max(error for _, layers in traced for _, error in layers) or 1.0
    shapes, y = list[str](), 14.0
    for name, layers in traced:
        shapes += [text(0, y, name), *_strip(y + 6, "layer", layers, largest), *_labels(y + 46, layers)]
        y += 68
    caption = f"Relative error of the hidden state after each layer; the strongest cell is {short(largest)}."
    yield Chart("Where drift comes from", picture(y - 14, shapes, "Error of the hidden state by layer"), caption)


def _layers(item: Mapping[str, Any]) -> list[tuple[str, float]]:
    explained = item.get("explain")
    blocks = explained.get("blocks") if isinstance(explained, Mapping) else None
    if not isinstance(blocks, list):
        return []
    return [(str(block.get("block", index)), float(block["error"])) for index, block in enumerate(blocks)]


def rounding_strips(drifts: Named) -> Iterator[Chart]:
    """A strip per kind of linear, where rounding errors were recorded."""
    for name, item in drifts:
        found = item.get("rounding_errors")
        if not found:
            continue
        largest = max(error for layers in found.values() for error in layers.values()) or 1.0
        shapes, y = list[str](), 0.0
        for kind, layers in found.items():
            cells = [(layer, float(error)) for layer, error in layers.items()]
            shapes += [text(_LEFT - 8, y + 16, kind, "end"), *_strip(y, kind, cells, largest, _LEFT)]
            y += 24
        shapes += _labels(y + 12, [(layer, 0.0) for layer in next(iter(found.values()))], _LEFT)
        caption = (
            f"Relative error of each linear's outputs on calibration text; the strongest cell is {short(largest)}."
        )
        yield Chart(f"{name}: rounding error by layer", picture(y + 18, shapes, "Rounding error by layer"), caption)


def _strip(y: float, what: str, layers: Layers, largest: float, left: float = 0.0) -> list[str]:
    width = (WIDTH - _RIGHT - left) / len(layers)
    return [
        box(
            left + i * width, y, width - 1, 22, "heat", f"{what} {label}: {short(error)}", 0.06 + 0.94 * error / largest
        )
        for i, (label, error) in enumerate(layers)
    ]


def _labels(y: float, layers: Layers, left: float = 0.0) -> list[str]:
    """Labels of layers, as many as there is room for."""
    width = (WIDTH - _RIGHT - left) / len(layers)
    step = max(1, int(26 / width) + 1) if width <= 26 else 1
    return [
        text(left + (i + 0.5) * width, y, label, "middle", "small")
        for i, (label, _) in enumerate(layers)
        if i % step == 0
    ]
