"""What latency is held against: processors, quotas, other work, bandwidth and energy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen3_export.core.checkpoint import open_checkpoint
from qwen3_export.core.processors import cpu_quota, others_wait, processors
from qwen3_export.core.source import open_source
from qwen3_export.prove.latency import Workload, _warnings, measure, weight_bytes
from qwen3_export.prove.meters import MachineLoad, energy_meter, memory_bandwidth
from qwen3_export.ship.gguf.encode import in_order
from qwen3_export.ship.onnx import export_onnx
from qwen3_export.ship.tensorrt import check_request


def _tree(base: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    return base


def test_quota_of_a_container(tmp_path: Path) -> None:
    two = _tree(
        tmp_path / "v2", {"cpu.max": "max 100000\n", "pod/cpu.max": "150000 100000\n", "pod/box/cpu.max": "max 1"}
    )
    groups = _tree(tmp_path, {"groups": "0::/pod/box\n"}) / "groups"
    assert cpu_quota(two, groups) == 1.5
    assert cpu_quota(_tree(tmp_path / "none", {"cpu.max": "max 100000"}), groups) is None
    one = {
        "cpu/box/cpu.cfs_quota_us": "300000\n",
        "cpu/box/cpu.cfs_period_us": "100000\n",
        "cpu/cpu.cfs_quota_us": "-1",
    }
    groups.write_text("4:memory:/box\n1:cpu:/box\n0::/\n")
    assert cpu_quota(_tree(tmp_path / "v1", {**one, "cpu/cpu.cfs_period_us": "100000"}), groups) == 3.0
    assert cpu_quota(tmp_path / "absent", tmp_path / "absent") is None


def test_quota_and_affinity_decide_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    for quota, threads in ((None, 8), (2.5, 2), (0.2, 1), (16.0, 8)):
        monkeypatch.setattr("qwen3_export.core.processors.cpu_quota", lambda quota=quota: quota)
        assert processors() == threads


@pytest.mark.parametrize(
    ("running", "threads", "count", "waits"),
    [
        ("1/90", 2, 2, False),
        ("2/90", 2, 2, True),
        ("3/90", 1, 2, True),
        ("2/90", 1, 2, False),
        ("4/90", 64, 64, False),
        ("9/90", 64, 64, True),
        ("9/90", 8, 64, False),
        ("0/0", 2, 2, False),
        ("?", 2, 2, False),
    ],
)
def test_other_work_that_wants_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: str, threads: int, count: int, waits: bool
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    monkeypatch.setattr("qwen3_export.core.processors.processors", lambda: threads)
    (tmp_path / "loadavg").write_text(f"0.50 0.40 0.30 {running} 4711\n")
    assert others_wait(tmp_path / "loadavg") == waits
    assert not others_wait(tmp_path / "absent")


def test_waiting_threads_of_llamacpp_sleep_where_other_work_has_a_processor() -> None:
    read = (
        "import os; os.environ.pop('GOMP_SPINCOUNT', None)\n"
        "from qwen3_export.run.llamacpp import interface\n"
        "interface.others_wait = lambda: {waits}\n"
        "interface.library(); print(os.environ['GOMP_SPINCOUNT'])"
    )
    for waits, spins in ((True, "0"), (False, "20000")):
        command = [sys.executable, "-c", read.format(waits=waits)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == spins


ASKS = {
    "quantize": "from qwen3_export.model.workers import import_torch; import_torch()",
    "run": "import pathlib, qwen3_export.run.torch as run; run.TorchSession(pathlib.Path('{model}'), None)",
    "validate": "from qwen3_export.prove.validate import open_reference; open_reference('{model}', tokens=64)",
    "demo": "from qwen3_export.cli.demo import _need_torch; _need_torch()",
}


@pytest.mark.parametrize("asks", ASKS)
def test_waiting_threads_of_torch_sleep_where_other_work_has_a_processor(
    asks: str, reference_folder: Path, tmp_path: Path
) -> None:
    """Its OpenMP reads the variable when it is loaded; children of the process look for themselves."""
    (tmp_path / "torch.py").write_text("import os; print(os.environ.get('GOMP_SPINCOUNT')); raise ImportError('none')")
    read = (
        "import os, sys; os.environ.pop('GOMP_SPINCOUNT', None); os.environ.update({given})\n"
        "from qwen3_export.core import process\n"
        "process.others_wait = lambda: {waits}\n"
        f"try:\n    {ASKS[asks].format(model=reference_folder)}\n"
        "except Exception:\n    print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    for waits, given, found in ((True, {}, "0 None"), (False, {}, "None None"), (True, {"GOMP_SPINCOUNT": "9"}, "9 9")):
        command = [sys.executable, "-c", read.format(waits=waits, given=given)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == found.split(), (waits, given)


@pytest.mark.parametrize("waits", [True, False])
def test_waiting_threads_of_onnxruntime_sleep_where_other_work_has_a_processor(
    waits: bool, monkeypatch: pytest.MonkeyPatch, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from qwen3_export.run.artifact import open_session
    from qwen3_export.run.session import RuntimeOptions

    export_onnx(open_checkpoint(make_checkpoint()), tmp_path / "onnx")
    monkeypatch.setattr("qwen3_export.run.ort_settings.others_wait", lambda: waits)
    for threads in (1, 2):
        session: Any = open_session(tmp_path / "onnx", RuntimeOptions(threads=threads))
        asked = session._session.get_session_options()
        entry = "session.intra_op.allow_spinning"
        if waits and threads == 2:
            assert asked.get_session_config_entry(entry) == "0"
        else:
            with pytest.raises(RuntimeError):
                asked.get_session_config_entry(entry)
        session.close()


def test_every_runtime_takes_the_threads_of_the_quota(monkeypatch: pytest.MonkeyPatch, reference_folder: Path) -> None:
    import torch

    from qwen3_export.core.processors import thread_count
    from qwen3_export.run.artifact import open_session

    monkeypatch.setattr("qwen3_export.core.processors.cpu_quota", lambda: 1.0)
    before = torch.get_num_threads()
    session = open_session(reference_folder)
    assert session.threads == thread_count(None) == 1
    session.close()
    torch.set_num_threads(before)


def test_writing_gguf_takes_the_threads_of_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_export.core.processors.cpu_quota", lambda: 1.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    names = set[str]()

    def task() -> None:
        time.sleep(0.01)
        names.add(threading.current_thread().name)

    assert len(list(in_order([task] * 8))) == 8
    assert len(names) == 1


def test_other_work_is_noticed(tmp_path: Path) -> None:
    idle = _tree(tmp_path, {"stat": "cpu  100 0 100 1000 0 0 0 0 0 0\n"}) / "stat"
    load = MachineLoad(idle)
    sum(range(3_000_000))  # our own work is not others'
    found = load.others()
    assert found is not None
    assert found < 0.05
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        load = MachineLoad()
        end = os.times().elapsed + 1.0
        while os.times().elapsed < end:
            os.getloadavg()
        assert (load.others() or 0) > 0.1
    finally:
        worker.kill()
        worker.wait()
    assert MachineLoad(tmp_path / "absent").others() is None


def test_bandwidth_is_a_plausible_number() -> None:
    assert 1e8 < memory_bandwidth(1) < 1e13


def test_energy_of_sockets_wraps_around(tmp_path: Path) -> None:
    base = "class/powercap/intel-rapl:0"
    files = {f"{base}/energy_uj": "900000", f"{base}/max_energy_range_uj": "1000000", f"{base}:0/energy_uj": "5"}
    meter = energy_meter(_tree(tmp_path, files))
    assert meter is not None
    meter.start()
    (tmp_path / base / "energy_uj").write_text("400000")
    assert meter.stop() == pytest.approx(0.5)


def test_energy_of_a_boards_rail(tmp_path: Path) -> None:
    base = "class/hwmon/hwmon3"
    files = {f"{base}/in1_label": "VDD_IN\n", f"{base}/in1_input": "5000", f"{base}/curr1_input": "2000"}
    others = {f"{base}/in2_label": "VDD_CPU_GPU_CV\n", f"{base}/in2_input": "5000", f"{base}/curr2_input": "9000"}
    meter = energy_meter(_tree(tmp_path, files | others))
    assert meter is not None
    started = os.times().elapsed
    meter.start()
    joules = meter.stop()
    assert 0 < joules <= 10 * (os.times().elapsed - started + 0.02)
    assert energy_meter(tmp_path / "absent") is None


def test_doubtful_figures_say_so(tmp_path: Path) -> None:
    quiet = {"other_work": 0.01, "prefill": [{"scatter": 0.01}], "decode": {"scatter": 0.02}}
    assert _warnings(quiet) == []
    assert "1.3 processors" in _warnings({**quiet, "other_work": 1.3})[0]
    assert "25%" in _warnings({**quiet, "decode": {"scatter": 0.25}})[0]
    folder = _tree(tmp_path, {"model.onnx": "x" * 9, "model.onnx.data": "x" * 70, "model.plan": "x" * 80})
    assert weight_bytes(folder) == 70


def test_a_length_that_is_given_twice_is_measured_once(reference_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a compute capability built for."""
    timed: list[int] = []

    def prefill(_session: object, ids: Sequence[int], _repeat: int) -> dict[str, Any]:
        timed.append(len(ids))
        return {"prompt_tokens": len(ids), "seconds_p50": 1.0, "seconds_p95": 1.0}

    monkeypatch.setattr("qwen3_export.prove.latency._prefill", prefill)
    found = measure(reference_folder, Workload((8, 16, 8), new_tokens=1, repeat=1, threads=1))
    assert timed == [8, 16]
    assert [item["prompt_tokens"] for item in found["prefill"]] == timed
    chosen = check_request(open_source("reference-model"), "rtx", ["8.9", "8.6", "8.9"], "fp16", onnx_only=True)
    assert chosen == ("8.9", "8.6")
