"""`python -m benchmarks.export.floor SOURCE OUTPUT`: the least that an export to 16 bits can cost.

Every byte of the source is read and hashed, written, and hashed as the output's; nothing else is done. Two threads
hash, a third copies.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwen3_export.core.growing_hash import GrowingHash
from qwen3_export.core.manifest import beside, sha256_file

_PIECE = 4 << 20


def main() -> None:
    source, output = Path(sys.argv[1]) / "model.safetensors", Path(sys.argv[2])
    output.mkdir()
    path = output / "model.onnx.data"
    hashed, buffer = beside(lambda: sha256_file(source)), memoryview(bytearray(_PIECE))
    with source.open("rb", buffering=0) as read, path.open("wb", buffering=0) as written:
        growing = GrowingHash(path)
        while count := read.readinto(buffer):
            written.write(buffer[:count])
            growing.wrote(written.tell())
    growing.finish()
    growing.result()
    hashed.result()


if __name__ == "__main__":
    main()
