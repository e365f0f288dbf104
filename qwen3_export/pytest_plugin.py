"""pytest plugin: artifacts as test subjects, with one reference for the whole session.

    pytest --qwen3-reference original.safetensors

    def test_release(assert_no_drift):
        assert_no_drift("model.gguf", max_kl=0.02)

Loading this file imports nothing heavy, since pytest loads it in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qwen3_export.prove.reference import Reference


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this plugin."""
    group = parser.getgroup("qwen3-export")
    group.addoption("--qwen3-reference", metavar="REFERENCE", help="A reference file, or the original itself.")
    group.addoption("--qwen3-threads", type=int, metavar="N", help="Threads of the artifacts' runtimes.")


@pytest.fixture(scope="session")
def qwen3_reference(request: pytest.FixtureRequest) -> Reference:
    """The original's answers: `--qwen3-reference`, opened once per session."""
    spec = request.config.getoption("--qwen3-reference")
    if spec is None:
        raise pytest.UsageError(
            "--qwen3-reference FILE is needed: `qwen3-export reference SOURCE --output FILE` writes it"
        )
    from qwen3_export.errors import ExportError
    from qwen3_export.prove.validate import open_reference

    try:
        return open_reference(spec)
    except ExportError as error:
        raise pytest.UsageError(_message(error)) from error


@pytest.fixture
def assert_no_drift(request: pytest.FixtureRequest, qwen3_reference: Reference) -> Callable[..., dict[str, Any]]:
    """`assert_no_drift(artifact, max_kl=…)`: run it in its own runtime and hold it to its limits.

    Takes the limits of a gate file by their names, `gate=` a gate file, `limits=` a mapping of dotted
    names such as `domains.math.max_kl`, and `on="upper"`. Fails the test with every limit that does not
    hold; returns the result, with the fields of `validate --json`.
    """
    threads = request.config.getoption("--qwen3-threads")

    def check(
        artifact: str | Path,
        *,
        gate: str | Path | None = None,
        limits: Mapping[str, float] | None = None,
        on: str = "mean",
        **named: float,
    ) -> dict[str, Any]:
        return _check(Path(artifact), gate, {**(limits or {}), **named}, on, qwen3_reference, threads)

    return check


def _check(
    artifact: Path,
    gate: str | Path | None,
    named: Mapping[str, float],
    on: str,
    reference: Reference,
    threads: int | None,
) -> dict[str, Any]:
    from qwen3_export.errors import ExportError
    from qwen3_export.prove.gate import explain
    from qwen3_export.prove.limits import read_limits
    from qwen3_export.prove.validate import validate
    from qwen3_export.run.session import RuntimeOptions

    try:
        limits = {**(read_limits(Path(gate)) if gate else {}), **named}
        if not limits:
            raise pytest.UsageError("assert_no_drift needs a limit, such as max_kl=0.02")
        result = validate([artifact], reference, limits, RuntimeOptions(threads=threads), on=on)["results"][0]
    except ExportError as error:
        pytest.fail(_message(error), pytrace=False)
    failed = [explain(item) for item in result["gate"]["checks"] if not item["passed"]]
    if failed:
        pytest.fail("\n".join(f"{artifact.name}: {line}" for line in failed), pytrace=False)
    return dict(result)


def _message(error: Exception) -> str:
    hint = getattr(error, "hint", None)
    return f"{error}\nhint: {hint}" if hint else str(error)
