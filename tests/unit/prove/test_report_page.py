"""report.html in a real browser: no error on its console, no request, readable in light, dark and on paper."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen3_export.prove.gate import check
from qwen3_export.prove.report import append_summary, markdown, page, write_report
from qwen3_export.prove.report.numbers import bytes_text, fixed, signed
from qwen3_export.prove.report.svg import ticks
from qwen3_export.prove.statistics import histogram, intervals
from tests.unit.prove.reports import drifts, report, result, speed

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
HOSTILE = '<script>alert("x")</script>&.gguf'


def texts(**more: int) -> dict[str, Any]:
    """What is counted of some greedy texts."""
    counts = {"texts": 4, "agreement": 0.75, "loops": 1, "loops_reference": 0}
    return {
        **counts,
        **({**more, "stops_reference": 2, "agreement_length": 3.0, "reference_length": 8.0} if more else {}),
    }


def measured(name: str, scale: float = 1.0, **limits: float) -> dict[str, Any]:
    """A result with everything that a picture is drawn of."""
    rows = drifts(scale)
    domains = {
        domain: {"tokens": 2000, "kl_mean": 0.02 * scale, "top1_agreement": 0.9, "ppl_ratio": 1.01, **intervals(part)}
        for domain, part in (("code", rows[::2]), ("math", rows[1::2]))
    }
    blocks = [{"block": i, "error": 0.01 * (i + 1) * scale} for i in range(28)]
    item = {
        **speed(scale, artifact=name),
        **result(rows, name),
        "kl_p99": 0.1,
        "domains": domains,
        "kl_histogram": histogram(rows),
        "seconds": 1.0,
        "generation": {**texts(), "thinking": texts(stops=1), "no_thinking": None},
        "flips": {"flips": 1, "sure_positions": 50, "share": 0.02, "sure_from": 0.9},
        "tasks": {
            "tasks": 3,
            "original_right": 2,
            "artifact_right": 1,
            "right_to_wrong": 1,
            "lost_share_ci95": [-0.1, 0.8],
            "kinds": {"json": {"tasks": 3, "original_right": 2, "artifact_right": 1}},
        },
        "rounding_errors": {kind: {str(i): 0.01 * (i + 1) for i in range(28)} for kind in ("q_proj", "down_proj")},
        "explain": {"blocks": blocks, "linears": [{"name": "model.layers.3.mlp.down_proj", "error": 0.2}]},
    }
    return {**item, "gate": check(item, limits)}


FULL = {
    **report(measured("a/model.gguf", max_kl=1.0), measured("b/model.gguf", 3.0, max_kl=0.02, min_top1=0.95)),
    "passed": False,
}
FULL["environment"] = {
    "host": "bench-1",
    "system": "Linux",
    "cpu": "A processor",
    "cores": 2,
    "load_average": [0.1, 0.2, 0.3],
    "memory_bytes": 8 << 30,
    "python": "3.11",
    "versions": {"numpy": "2"},
    "date": "2026-01-02T03:04:05+00:00",
}


class Reader(HTMLParser):
    """Tags that are opened and closed as they should be, with what they hold."""

    VOID = ("meta", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_the_verdict_and_what_failed_come_first() -> None:
    read = Reader(page(FULL, "Validation"))
    words = [word for word in read.words if word.strip()]
    start = words.index("FAIL")
    assert words[start + 1].startswith("b/model.gguf: max_kl is ")
    assert re.fullmatch(r"b/model\.gguf: min_top1 is 0\.9 \(95 %: 0\.8.*\), the limit is 0\.95", words[start + 2])
    wanted = ["Drift", "Checks", "Drift by domain", "Histogram of KL", "Where drift comes from"]
    wanted += [f"{name}/model.gguf: rounding error by layer" for name in "ab"]
    wanted += ["Prefill", "Decode"]
    assert read.headings[1 : 1 + len(wanted)] == wanted
    assert "Statistics (± as llama-perplexity prints it)" in read.headings
    assert {"Generated texts", "Tasks", "Flips of the top token where the original is sure"} <= set(read.headings)
    for cell in ("3.0 of 8.0", "1/2", "2.00 %", "-0.100 … 0.800", "model.layers.3.mlp.down_proj"):
        assert cell in read.words
    assert read.headings[-1] == "Environment"
    text = "\n".join(read.words)
    for fact in ("bench-1", "A processor", "0.1, 0.2, 0.3", "numpy 2", "2026-01-02T03:04:05+00:00", "8.6 GB"):
        assert fact in text
    assert read.seen.count("svg") == 7


def test_nothing_is_fetched_and_nothing_is_run() -> None:
    text = page({**FULL, "results": [measured(HOSTILE)]}, HOSTILE)
    read = Reader(text)
    assert not {"script", "img", "iframe", "object"} & set(read.seen)
    assert not re.search(r'(?:src|href|url)\s*[=(]\s*["\']?(?:https?:|//|file:)', text)
    assert "default-src 'none'" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "report"
    write_report(folder, FULL, title="Validation")
    return folder


def browse(*arguments: str) -> subprocess.CompletedProcess[str]:
    if BROWSER is None:
        pytest.skip("needs headless Chromium: apt-get install chromium-headless-shell")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page wrote to the browser's console, and what the browser complained of."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_it_without_an_error_on_its_console(folder: Path) -> None:
    done = browse("--dump-dom", (folder / "report.html").as_uri())
    assert console(done) == []
    assert done.stdout.count("<svg") == 7
    broken = folder.parent / "broken.html"
    broken.write_text(
        (folder / "report.html").read_text().replace("</main>", '<img src="http://127.0.0.1:9/x"></main>')
    )
    assert console(browse("--dump-dom", broken.as_uri())), "an error on the console must be seen by this test"


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_light_or_dark_as_the_system_is(folder: Path, tmp_path: Path, dark: bool) -> None:
    target = tmp_path / "page.png"
    colors = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    done = browse(*colors, f"--screenshot={target}", "--window-size=1000,1600", (folder / "report.html").as_uri())
    assert console(done) == []
    pixels = np.asarray(Image.open(target).convert("RGB"), float)
    paper = pixels[2, 2].mean()
    assert paper < 60 if dark else paper > 240
    # A page that is a blank sheet has one color; text and bars differ from the paper by far.
    assert (abs(pixels.mean(-1) - paper) > 90).mean() > 0.01


def test_it_prints_on_paper(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.pdf"
    done = browse(f"--print-to-pdf={target}", "--no-pdf-header-footer", (folder / "report.html").as_uri())
    assert console(done) == []
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 10


def test_markdown_goes_to_the_job_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    append_summary(FULL, "Validation")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    append_summary(FULL, "Validation")
    append_summary(FULL, "Validation")
    assert (tmp_path / "summary.md").read_text() == 2 * (markdown(FULL, "Validation") + "\n")


@pytest.mark.parametrize(
    ("value", "text"), [(-1e-9, "0.0000"), (0.0, "0.0000"), (-0.0, "0.0000"), (-0.5, "-0.5000"), (1.23456, "1.2346")]
)
def test_no_minus_before_a_zero(value: float, text: str) -> None:
    assert fixed(value, 4) == text


def test_numbers_for_people() -> None:
    assert [signed(value, 1) for value in (0.24, 0.01, -0.01, -3.0)] == ["+0.2", "0.0", "0.0", "-3.0"]
    assert [bytes_text(value) for value in (0, 999, 1000, 7.9e6, 2e13)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "7.9 MB",
        "20.0 TB",
    ]


@pytest.mark.parametrize("largest", [1e-9, 0.0385, 0.07, 0.99, 1.0, 1.01, 7, 99, 12345, 1.6e7])
def test_ticks_are_round_and_reach_the_largest_value(largest: float) -> None:
    found = ticks(largest)
    assert found[0] == 0
    assert 3 <= len(found) <= 6
    step = found[1]
    assert found[-1] <= largest * (1 + 1e-9) < found[-1] + step * (1 + 1e-9)
    assert float(f"{step:.1e}".split("e")[0]) in (1, 2, 5)
