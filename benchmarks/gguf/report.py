"""Results of the GGUF benchmarks: a JSON file and the Markdown made from it.

    quality   checkpoint, type, way → bytes, KL, top-1        `benchmarks.gguf`
    speed     model, type → tokens per second                 `benchmarks.gguf.speed`
    cost      model, job → CPU seconds, peak memory           `benchmarks.gguf.cost`

Every run adds its rows to the file. `python -m benchmarks.gguf.report FILE.json` writes the page, the guide's table
and the README's again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cost.__main__ import SHAPE
from benchmarks.gguf.files import SOLVED, UNWEIGHED, WAYS
from benchmarks.quality.checkpoints import MAKERS
from benchmarks.quality.report import table
from qwen3_export.core.gguf_types import block_size, module_types
from qwen3_export.core.qwen3 import parse_config

Row = dict[str, Any]
KEYS = {"quality": ("checkpoint", "type", "way"), "speed": ("model", "type"), "cost": ("model", "job")}
BEST = "llama.cpp imatrix"
# Aims: largest share of the KL of llama.cpp's quantizer with the matrix; the second for `outliers`.
AIMS = {"q4_k_m": 0.45, "q4_0": 0.60, "q3_k_m": 0.40, "q2_k": 0.35, "q5_k_m": 0.60}
AIM_WITH_OUTLIERS = 0.20
# The largest KL of a solved file in llama.cpp, over that of its folder in torch.
GAP_AIM = 1.10
ORDER = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "iq4_nl", "q4_0", "q4_1", "q4_k_s", "q4_k_m",
    "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "mxfp4", "mxfp4_moe", "q8_0",
)  # fmt: skip
SAID = """KL in nats per token and top-1 agreement, in llama.cpp. `×`: solved, relative to llama.cpp's quantizer with
its matrix. Gap: the solved file's KL over that of its folder in torch, where inputs are not rounded; its aim is
{aim:.2f}. Sizes: how far those two files' are apart.
"""
# The shape of Qwen3-8B, for sizes.
BIG = {
    **SHAPE,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
# The guide's column on what a type is for.
USES = {
    "q8_0": "nearly lossless, where there is room",
    "q6_k": "laptops with room",
    "q5_k_m": "laptops with 8 GB and more",
    "q4_k_m": "the usual choice",
    "q4_0": "phones and ARM boards, whose kernels repack it",
    "iq4_xs": "the smallest good 4 bits",
    "q3_k_m": "only where 4 bits do not fit",
    "q2_k": "only where nothing else fits",
}
GUIDE, README = Path("docs/cpu.md"), Path("README.md")
BEGIN, END = "<!-- written by benchmarks.gguf.report -->\n", "<!-- end -->\n"


def add(path: Path, part: str, rows: Iterable[Row]) -> None:
    """Add rows to the file, replacing those of the same key; write its page."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = {_key(part, row): row for row in found.get(part, [])} | {_key(part, row): row for row in rows}
    found[part] = [kept[key] for key in sorted(kept)]
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(path)


def _key(part: str, row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEYS[part])


def write_page(path: Path) -> None:
    """Write FILE.md beside FILE.json."""
    found = json.loads(path.read_text(encoding="utf-8"))
    parts = [
        "# GGUF, November 2026\n\nWritten by `benchmarks.gguf`, `.speed` and `.cost` from the JSON file beside it.\n"
    ]
    if rows := found.get("quality"):
        parts.append(quality(rows))
    if rows := found.get("speed"):
        parts.append(speed(rows))
    if rows := found.get("cost"):
        parts.append(cost(rows))
    path.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def write_guide(path: Path, guide: Path = GUIDE) -> None:
    """Rewrite the guide's table between its two marks."""
    _rewrite(guide, which_type(json.loads(path.read_text(encoding="utf-8"))))


def write_readme(path: Path, readme: Path = README) -> None:
    """Rewrite the README's table between its two marks."""
    _rewrite(readme, at_a_glance(json.loads(path.read_text(encoding="utf-8"))["quality"]))


def _rewrite(page: Path, written: str) -> None:
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{written}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def at_a_glance(rows: list[Row]) -> str:
    """The README's table: size, KL and device of the reference model's files."""
    mine = {(row["type"], row["way"]): row for row in rows if row["checkpoint"] == "reference-model"}
    lines = [
        [
            f"`{name}`",
            f"{mine[name, SOLVED]['bytes'] / 1e6:.2f}",
            *(f"{mine[name, way]['kl']:.4f}" for way in (SOLVED, BEST)),
            USES[name],
        ]
        for name in USES
        if {(name, SOLVED), (name, BEST)} <= set(mine)
    ]
    return table(["file type", "MB", "solved", "`llama-quantize`, matrix", "for"], lines)


def which_type(found: dict[str, list[Row]]) -> str:
    """The guide's table: the use, KL and gain of solving of each type."""
    rows = {_key("quality", row): row for row in found["quality"]}
    names = [name for name in MAKERS if any(key[0] == name for key in rows)]
    rates = {r["type"]: f"{r['decode']:.0f}" for r in found.get("speed", []) if r["model"] == "shape of Qwen3-0.6B"}
    lines = []
    for type_name in USES:
        kl = {key: row["kl"] for key, row in rows.items() if key[1] == type_name}
        if not kl:
            continue
        same = type_name in UNWEIGHED  # with the matrix and without
        ways = [way.removesuffix(" imatrix") if same else way for way in (BEST, "ours imatrix", SOLVED)]
        own = [kl.get((names[0], type_name, way)) for way in ways]
        pairs = [(kl.get((name, type_name, SOLVED)), kl.get((name, type_name, BEST))) for name in names]
        lines.append(
            [
                f"`{type_name}`",
                USES[type_name],
                f"{bits_per_weight(type_name):.1f}",
                *("–" if value is None else f"{value:.4f}" for value in own),
                *("–" if not (ours and theirs) else f"{ours / theirs:.2f}" for ours, theirs in pairs),
                *([rates.get(type_name, "–")] if rates else []),
            ]
        )
    ways = ["`llama-quantize`, matrix", "rounded, matrix", "solved"]
    header = ["type", "for", "bits", *ways, *(f"× {name}" for name in names), *(["tokens/s"] if rates else [])]
    return f"{table(header, lines)}\n\n{_said([row for row in rows.values() if row['checkpoint'] == names[0]])}"


def bits_per_weight(type_name: str) -> float:
    """Bits per weight of a file at the shape of Qwen3-8B."""
    config = parse_config(BIG, "config")
    types, shapes = module_types(config, type_name, weighed=True), config.all_linears() | config.outer_matrices()
    sizes = {module: math.prod(shape) for module, shape in shapes.items()}
    bits = {name: 8 * block_size(name)[1] / block_size(name)[0] for name in types.values()}
    return sum(bits[types[module]] * size for module, size in sizes.items()) / sum(sizes.values())


def quality(rows: list[Row]) -> str:
    """One table per checkpoint: KL by type and way, solving's gain, gap to torch."""
    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    parts = [SAID.format(aim=GAP_AIM)]
    for name in names:
        mine = [row for row in rows if row["checkpoint"] == name]
        types = sorted({row["type"] for row in mine}, key=lambda t: (ORDER.index(t) if t in ORDER else 99, t))
        lines = [_quality_line(name, t, {row["way"]: row for row in mine if row["type"] == t}) for t in types]
        header = ["type", "MB", *WAYS, "×", "aim", "top-1 solved", "gap", "sizes"]
        parts.append(f"## {name}\n\n{_said(mine)}\n\n{table(header, lines)}\n")
    return "\n".join(parts)


def _said(rows: list[Row]) -> str:
    """How a checkpoint's rows were measured, and their median standard error."""
    one, shares = rows[0], sorted(row["kl_error"] / row["kl"] for row in rows)
    return (
        f"{one['positions']:,} held-out positions, {one['samples']} calibration samples of "
        f"{one['sequence_length']} tokens; ± about {shares[len(shares) // 2]:.0%}."
    )


def _quality_line(checkpoint: str, type_name: str, ways: dict[str, Row]) -> list[str]:
    solved, best, sizes = ways.get(SOLVED), ways.get(BEST), [row["bytes"] for row in ways.values()]
    apart = abs(solved["bytes"] / best["bytes"] - 1) if solved and best else None
    aim = AIMS.get(type_name)
    if aim is not None and checkpoint == "outliers":
        aim = min(aim, AIM_WITH_OUTLIERS)
    share = solved["kl"] / best["kl"] if solved and best else None
    gap = solved["kl"] / solved["kl_torch"] if solved else None
    return [
        type_name,
        f"{max(sizes) / 1e6:.2f}",
        *(f"{ways[way]['kl']:.5f}" if way in ways else "–" for way in WAYS),
        "–" if share is None else f"{share:.2f}",
        "–" if aim is None or share is None else f"{aim:.2f} {'holds' if share <= aim else 'missed'}",
        f"{solved['top1']:.1%}" if solved else "–",
        "–" if gap is None else f"{gap:.3f} {'holds' if gap <= GAP_AIM else 'missed'}",
        "–" if apart is None else f"{apart:.2%}",
    ]


def speed(rows: list[Row]) -> str:
    """One table per model: tokens per second by type."""
    parts = ["# Speed in llama.cpp\n"]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        lines = [[r["type"], f"{r['bytes'] / 1e6:.1f}", f"{r['prefill']:.0f}", f"{r['decode']:.1f}"] for r in mine]
        said = "{threads} threads, prompts of {prompt} tokens; the median of {new} tokens.".format(**mine[0])
        parts.append(f"## {name}\n\n{said}\n\n{table(['type', 'MB', 'prompt tokens/s', 'new tokens/s'], lines)}\n")
    return "\n".join(parts)


def cost(rows: list[Row]) -> str:
    """One table per model: CPU seconds and peak memory beside llama.cpp's tools."""
    parts = [
        "# Cost of writing a file\n\nEach a process of its own, in turn in one run; CPU seconds are user and system.\n"
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        lines = [[r["job"], f"{r['cpu_s']:.1f}", f"{r['wall_s']:.1f}", f"{r['peak_rss'] / 1e6:.0f}"] for r in mine]
        parts.append(f"## {name}\n\n{table(['job', 'CPU s', 'wall s', 'peak MB'], lines)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
    write_guide(Path(sys.argv[1]))
    write_readme(Path(sys.argv[1]))
