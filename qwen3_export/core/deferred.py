"""Import a library without a slow module that it needs only at times."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """Takes a module's place during an import, and leads to it afterwards."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._importer: int | None = threading.get_ident()

    def __getattr__(self, attribute: str) -> Any:
        # Other threads may import the module at the same time: they get the real one.
        if self._importer == threading.get_ident():
            return lambda *given, **named: getattr(self._real(), attribute)(*given, **named)
        return getattr(self._real(), attribute)

    def _real(self) -> ModuleType:
        self.leave()
        return import_module(self.__name__)

    def leave(self) -> None:
        """Make room for the real module."""
        if sys.modules.get(self.__name__) is self:
            sys.modules.pop(self.__name__, None)

    def close(self) -> None:
        """End the imports that see functions in place of every attribute."""
        self._importer = None
        self.leave()


@contextmanager
def deferred(name: str) -> Iterator[None]:
    """Give modules imported inside a stand-in of module `name`, loaded when used.

    While they are imported they may name its functions but not call them, nor derive from its classes. Nothing happens
    where `name` is loaded already.
    """
    if name in sys.modules:
        yield
        return
    stand_in = _StandIn(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        stand_in.close()
