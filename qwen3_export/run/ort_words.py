"""ONNX Runtime's errors in a reader's words.

It says `[ONNXRuntimeError] : 1 : FAIL : tensorprotoutils.cc:1876 GetExtData… External initializer: …`, often with one
such text inside another. A user needs the last part; the code and the places in its source are for its developers.
"""

from __future__ import annotations

import re

_PREFIX = re.compile(r".*\[ONNXRuntimeError\] : \d+ : \w+ :\s*")
_PLACE = re.compile(r"(?:\S*/)?\w+\.(?:cc|cpp|cu|h|hpp):\d+ ")


def reason_of(error: Exception) -> str:
    """The reason in one line; the error's type where it has no text."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = _PREFIX.sub("", text)
    place = _PLACE.search(text)
    if place is not None:
        text = text[: place.start()] + _without_function(text[place.end() :])
    return text.removeprefix("Exception during initialization: ").strip() or type(error).__name__


def _without_function(text: str) -> str:
    """`text` without the C++ function, with parameters or none, that it begins with."""
    name, space, rest = text.partition(" ")
    opened = text.find("(")
    if opened < 0 or "::" not in text[:opened]:
        return rest if space and re.fullmatch(r"[\w:~]+", name) else text
    depth = 0
    for place in range(opened, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return re.sub(r"^\s*(?:const)?\s*", "", text[place + 1 :])
    return text
