"""All commands: importing a module of commands registers them with the application."""

from __future__ import annotations

from qwen3_export.cli import (  # noqa: F401  (they register their commands)
    bench,
    calibrate,
    demo,
    gate,
    plan,
    prove,
    recipes,
    serve,
    ship,
    solve,
    talk,
    tasks,
)
from qwen3_export.cli.app import app

__all__ = ["app"]
