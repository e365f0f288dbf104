"""A lab whose nodes cannot take measurements, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.cluster.session import Node
from qwen3_export.core.progress import Progress
from qwen3_export.errors import InputError
from qwen3_export.prove import lab
from qwen3_export.prove.latency import Workload

REQUEST = lab.LatencyRequest(Workload(), {})


class Session:
    """Starts no measurement before somebody has waited `turns` times."""

    def __init__(self, nodes: Sequence[Node], turns: int = 0) -> None:
        self._nodes, self.turns, self.placed = nodes, turns, 0

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def place(self, *_: Any, **__: Any) -> Session:
        self.placed += 1
        return self

    def call(self, method: str, *_: Any) -> str:
        return method

    def answers(self, calls: Sequence[Any], seconds: float | None = None) -> list[Any]:
        if seconds != 0 and "measure" in calls:
            self.turns -= 1
        return list(calls) if self.turns < 0 else []

    def answer(self, _: Any) -> Any:
        return "host", {"results": [{"artifact": "a"}], "environment": {}}

    def end(self, _: Any) -> None:
        pass


class Notes(Progress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def measured(session: Session, labels: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is noted while one artifact is measured."""

    @contextmanager
    def open_session(*_: Any) -> Iterator[Session]:
        yield session

    monkeypatch.setattr(lab, "open_session", open_session)
    notes = Notes()
    assert lab.measure_on_nodes("host:1", labels, [Path("a")], REQUEST, notes)["passed"]
    return notes.notes


def node(cpus: float = 1, *labels: str) -> Node:
    return Node("a", "a", cpus, 0, 1 << 30, frozenset(labels))


def test_nodes_without_a_processor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session([node(0, "jetson")])
    with pytest.raises(InputError, match="no node of the cluster offers a CPU"):
        measured(session, (), monkeypatch)
    assert session.placed == 0
    # A label's node needs none.
    assert measured(session, ("jetson",), monkeypatch) == []


@pytest.mark.parametrize(("labels", "wanted"), [((), "CPU"), (("jetson",), "jetson")])
def test_what_is_waited_for_is_said_once(labels: Sequence[str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (note,) = measured(Session([node(1, "jetson")], turns=3), labels, monkeypatch)
    assert f"a free {wanted}: other work uses them" in note
