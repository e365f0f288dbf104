"""Charts of a result as inline SVG.

They show drift by domain, the histogram of KL, errors by layer, latency, and candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log10
from typing import Any

from qwen3_export.prove.report.heat import hidden_state_strips, rounding_strips
from qwen3_export.prove.report.numbers import bytes_text, fixed, kl_mark, short
from qwen3_export.prove.report.svg import WIDTH, Chart, box, color, curve, dot, legend, line, picture, text, ticks
from qwen3_export.prove.report.tables import named

_LEFT, _RIGHT = 130, 20
Named = Sequence[tuple[str, Mapping[str, Any]]]


def charts(result: Mapping[str, Any]) -> Iterator[Chart]:
    """All charts that a result has data for."""
    items = named(result)
    if result.get("candidates"):
        yield from _candidates(result["candidates"])
    drifts = [(name, item) for name, item in items if "kl_mean" in item]
    if any(item["domains"] for _, item in drifts):
        yield _domains(drifts)
    counted = [(name, item) for name, item in drifts if "kl_histogram" in item]
    if counted:
        yield _histogram(counted)
    yield from hidden_state_strips(drifts)
    yield from rounding_strips(drifts)
    speeds = [(name, item) for name, item in items if item.get("prefill") and item.get("decode")]
    if speeds:
        yield _prefill(speeds)
        yield _decode(speeds)


def _domains(drifts: Named) -> Chart:
    domains = sorted({domain for _, item in drifts for domain in item["domains"]})
    largest = max(_high(item["domains"][domain]) for _, item in drifts for domain in item["domains"])
    shapes, y = legend([name for name, _ in drifts], 12)
    scale = (WIDTH - _LEFT - _RIGHT - 60) / (largest or 1)
    for domain in domains:
        shapes.append(text(_LEFT - 8, y + 7 * len(drifts) + 4, domain, "end"))
        for index, (name, item) in enumerate(drifts):
            if domain in item["domains"]:
                shapes += _bar(y, scale, index, f"{name}, {domain}", item["domains"][domain])
            y += 14
        y += 8
    caption = "Mean KL of each domain in nats per token; the whisker is its 95 % interval."
    return Chart("Drift by domain", picture(y + 4, shapes, "Mean KL by domain"), caption)


def _high(domain: Mapping[str, Any]) -> float:
    return max(domain["kl_mean"], domain.get("kl_ci95", [0, 0])[1], 0.0)


def _bar(y: float, scale: float, index: int, name: str, domain: Mapping[str, Any]) -> list[str]:
    mean, (low, high) = max(domain["kl_mean"], 0.0), domain.get("kl_ci95", [domain["kl_mean"]] * 2)
    end = _LEFT + scale * max(high, mean)
    return [
        box(_LEFT, y, scale * mean, 11, f"fill {color(index)}", f"{name}: {short(domain['kl_mean'])}"),
        line(_LEFT + scale * max(low, 0), y + 5.5, end, y + 5.5, "whisker"),
        text(end + 6, y + 9.5, short(domain["kl_mean"]), kind="small"),
    ]


def _histogram(drifts: Named) -> Chart:
    shapes, top = legend([name for name, _ in drifts], 12)
    exponents = drifts[0][1]["kl_histogram"]["exponents"]
    share = [[n / sum(item["kl_histogram"]["counts"]) for n in item["kl_histogram"]["counts"]] for _, item in drifts]
    height, largest = 180.0, max(max(values) for values in share)
    bottom = top + height
    across = (WIDTH - _LEFT - _RIGHT) / (exponents[-1] - exponents[0])

    def x(exponent: float) -> float:
        return _LEFT + across * (exponent - exponents[0])

    for tick in ticks(largest):
        y = bottom - height * tick / largest
        shapes += [
            line(_LEFT, y, WIDTH - _RIGHT, y, "grid"),
            text(_LEFT - 8, y + 4, f"{100 * tick:g} %", "end", "small"),
        ]
    for exponent in exponents[::2]:
        shapes.append(text(x(exponent), bottom + 16, f"1e{exponent:g}", "middle", "small"))
    for index, values in enumerate(share):
        steps = [(x(edge), bottom - height * value / largest) for edge, value in _stairs(exponents, values)]
        shapes.append(curve(steps, f"line {color(index)}"))
    label = "Share of positions by their KL, logarithmic"
    caption = (
        "Share of the scored positions by their KL in nats; what lies left of the axis is counted in its first bin."
    )
    return Chart("Histogram of KL", picture(bottom + 24, shapes, label), caption)


def _stairs(edges: Sequence[float], values: Sequence[float]) -> Iterator[tuple[float, float]]:
    for low, high, value in zip(edges, edges[1:], values, strict=False):
        yield from ((low, value), (high, value))


def _prefill(speeds: Named) -> Chart:
    shapes, top = legend([name for name, _ in speeds], 12)
    counts = sorted({one["prompt_tokens"] for _, item in speeds for one in item["prefill"]})
    largest = max(one["seconds_p95"] for _, item in speeds for one in item["prefill"])
    height, bottom = 180.0, top + 180.0
    across = (WIDTH - _LEFT - _RIGHT) / counts[-1]
    for tick in ticks(largest):
        y = bottom - height * tick / largest
        shapes += [line(_LEFT, y, WIDTH - _RIGHT, y, "grid"), text(_LEFT - 8, y + 4, f"{tick:g} s", "end", "small")]
    shapes += [text(_LEFT + across * count, bottom + 16, str(count), "middle", "small") for count in counts]
    for index, (name, item) in enumerate(speeds):
        points = [(_LEFT + across * one["prompt_tokens"], one) for one in item["prefill"]]
        shapes.append(
            curve([(x, bottom - height * one["seconds_p50"] / largest) for x, one in points], f"line {color(index)}")
        )
        for x, one in points:
            y50, y95 = (bottom - height * one[key] / largest for key in ("seconds_p50", "seconds_p95"))
            title = f"{name}, {one['prompt_tokens']} tokens: {short(one['seconds_p50'])} s"
            shapes += [line(x, y50, x, y95, "whisker"), dot(x, y50, 4, f"fill {color(index)}", title)]
    caption = "Seconds to read a prompt, by its length in tokens: the median, and a whisker up to the 95th percentile."
    return Chart("Prefill", picture(bottom + 24, shapes, "Seconds to read a prompt by its length"), caption)


def _decode(speeds: Named) -> Chart:
    largest = max(item["decode"]["p99"] for _, item in speeds)
    scale, y = (WIDTH - _LEFT - _RIGHT - 60) / largest, 8.0
    shapes = list[str]()
    for index, (name, item) in enumerate(speeds):
        decode = item["decode"]
        marks = {"p50": decode["per_token_seconds_p50"], "p95": decode["p95"], "p99": decode["p99"]}
        shapes.append(text(_LEFT, y + 4, name))
        for key, opacity in (("p99", 0.25), ("p95", 0.5), ("p50", 1.0)):
            title = f"{name}, {key}: {fixed(1000 * marks[key], 2)} ms"
            shapes.append(box(_LEFT, y + 9, scale * marks[key], 12, f"fill {color(index)}", title, opacity))
        shapes.append(text(_LEFT + scale * largest + 6, y + 19, f"{short(1000 * marks['p50'])} ms", kind="small"))
        y += 34
    caption = "Time per generated token: median (full), 95th and 99th percentile (paler)."
    return Chart("Decode", picture(y, shapes, "Time per generated token"), caption)


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """Candidates by size (x), drift (y, logarithmic) and speed (area), the front ringed."""
    known = [item for item in candidates if item["bytes"] and item["kl_mean"] is not None]
    if not known:
        return
    top, bottom = 16.0, 316.0
    x, size_ticks = _size_axis([item["bytes"] for item in known])
    y, drift_ticks = _drift_axis([item["kl_mean"] for item in known], top, bottom)
    shapes = [text(x(tick), bottom + 18, bytes_text(tick), "middle", "small") for tick in size_ticks]
    for tick in drift_ticks:
        shapes += [line(_LEFT, y(tick), WIDTH - _RIGHT, y(tick), "grid")]
        shapes += [text(_LEFT - 8, y(tick) + 4, f"{tick:.0e}", "end", "small")]
    fastest = max((item["tokens_per_second"] or 0.0 for item in known), default=0.0)
    front = sorted(((x(i["bytes"]), y(i["kl_mean"])) for i in known if i["pareto"]), key=lambda point: point[0])
    shapes.append(curve(front, "front"))
    for index, item in enumerate(known):
        shapes += _candidate(item, index, x(item["bytes"]), y(item["kl_mean"]), fastest)
    caption = (
        "Size across, mean KL upwards (logarithmic), both better when smaller; the larger a dot's area, the faster it "
        "decodes (a small square: speed not measured). Ringed and joined: no other is better in size, drift and speed."
    )
    yield Chart("Size × drift × speed", picture(bottom + 28, shapes, "Candidates by size, drift and speed"), caption)


def _size_axis(sizes: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    largest = max(sizes)
    return lambda size: _LEFT + 30 + (WIDTH - _LEFT - _RIGHT - 160) * size / largest, ticks(largest)


def _drift_axis(drifts: Sequence[float], top: float, bottom: float) -> tuple[Callable[[float], float], list[float]]:
    """A logarithmic axis between powers of ten, values up to 0 at its bottom."""
    positive = [value for value in drifts if value > 0] or [1e-6]
    low, high = int(log10(min(positive)) // 1), int(log10(max(positive)) // 1) + 1
    height = (bottom - top) / (high - low)
    return lambda value: bottom - height * (log10(max(value, 10.0**low)) - low), [10.0**e for e in range(low, high + 1)]


def _candidate(item: Mapping[str, Any], index: int, x: float, y: float, fastest: float) -> list[str]:
    speed = item["tokens_per_second"]
    radius = 4 + 10 * (speed / fastest) ** 0.5 if speed and fastest else 4.0
    pace = f"{speed:.1f} tok/s" if speed else "speed not measured"
    title = f"{item['name']}: {bytes_text(item['bytes'])}, KL {kl_mark(item)}{short(item['kl_mean'])}, {pace}"
    fill = f"fill {color(index)}"
    shapes = [dot(x, y, radius, fill, title) if speed else box(x - 4, y - 4, 8, 8, fill, title)]
    if item["pareto"]:
        shapes.append(dot(x, y, radius + 3, "ring", title))
    return [*shapes, text(x + radius + 6, y + 4, item["name"], kind="small")]
