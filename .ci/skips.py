"""Print what was skipped and why; fail when a skipped test could have run on a 2-core CPU machine."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

# Beginnings of reasons that hold on a machine without them (a table that the program printed elsewhere is compared
# on every machine).
ALLOWED = (
    "needs an NVIDIA GPU",
    "needs a processor with AVX2",
    "needs llama-perplexity, which Debian's packages have",
)


def main() -> int:
    """Read the JUnit report named on the command line."""
    forbidden = 0
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is None:
            continue
        reason = skipped.get("message", "")
        allowed = reason.startswith(ALLOWED)
        forbidden += not allowed
        print(f"skipped{'' if allowed else ' (NOT ALLOWED)'}: {case.get('classname')}.{case.get('name')}: {reason}")
    if forbidden:
        print(f"error: {forbidden} tests were skipped that should run on this machine")
    return 1 if forbidden else 0


if __name__ == "__main__":
    sys.exit(main())
