"""Modules that are loaded when they are used, not when those that need them are imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_export.core.deferred import deferred

SLOW = "def double(x):\n    return 2 * x\n\n\nclass Kind:\n    pass\n"
USER = """
import slow_one

TABLE = {"twice": slow_one.double}


def is_kind(x):
    return isinstance(x, slow_one.Kind)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a module and one that imports it."""
    (tmp_path / "slow_one.py").write_text(SLOW)
    (tmp_path / "user_one.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("slow_one", "user_one"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.usefixtures("modules")
def test_a_module_is_loaded_at_its_first_use() -> None:
    with deferred("slow_one"):
        import user_one  # type: ignore[import-not-found]
    assert "slow_one" not in sys.modules
    assert user_one.TABLE["twice"](4) == 8
    import slow_one  # type: ignore[import-not-found]

    assert user_one.is_kind(slow_one.Kind())
    assert not user_one.is_kind(4)
    assert Path(slow_one.__file__).read_text() == SLOW


@pytest.mark.usefixtures("modules")
def test_a_module_that_is_there_stays() -> None:
    import slow_one

    with deferred("slow_one"):
        import user_one
    assert user_one.slow_one is slow_one
    assert sys.modules["slow_one"] is slow_one


@pytest.mark.usefixtures("modules")
def test_another_thread_gets_the_module_itself() -> None:
    found: list[object] = []

    def use() -> None:
        import slow_one

        found.append(slow_one.Kind)

    with deferred("slow_one"):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert isinstance(found[0], type)


@pytest.mark.usefixtures("modules")
def test_an_import_that_fails_leaves_nothing() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), deferred("slow_one"):
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert "slow_one" not in sys.modules


def test_onnx_ir_works_without_its_algebra_and_with_it() -> None:
    code = (
        "import sys\n"
        "from qwen3_export.ship.onnx.library import ir\n"
        "shape = ir.Shape([1, 'n'])\n"
        "assert 'sympy' not in sys.modules\n"
        "assert ir.SymbolicDim('max(a, b) + floor(c / 2)').evaluate({'a': 3, 'b': 4, 'c': 9}) == 8\n"
        "assert str(ir.SymbolicDim('n') * 2 + 1) == '2*n + 1'\n"
        "import sympy\n"
        "assert sympy.Integer(3) + 1 == 4\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", [("onnx",), ("onnx", "--flavor", "standard"), ("tensorrt", "--onnx-only")])
def test_no_export_loads_it(make_checkpoint: Callable[..., Path], tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    arguments = ["qwen3-export", name, str(make_checkpoint()), "--output", str(tmp_path / "out"), "-q", *options]
    code = (
        "import sys\n"
        "from qwen3_export.cli import main\n"
        f"sys.argv = {arguments!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'onnx_ir' in sys.modules and 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "out" / "model.onnx").is_file()
