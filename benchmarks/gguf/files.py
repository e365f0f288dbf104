"""The compared files: ours and `llama_model_quantize`'s, without and with an importance matrix.

    ours             gguf --type T                  rounded to nearest
    ours imatrix     gguf --type T --imatrix        the same, errors weighted by the matrix
    ours solved      quantize --recipe gguf-T       where such a recipe is shipped
    llama.cpp        llama_model_quantize           from our bf16 file, which is the converter's byte for byte
    llama.cpp imatrix                               the same, with the importance matrix

Both tools take the same importance matrix, which `calibrate` measures on the rows that the solver sees.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qwen3_export.core.checkpoint import Checkpoint, open_checkpoint
from qwen3_export.core.gguf_types import FILE_TYPES
from qwen3_export.core.imatrix import Imatrix, read_imatrix
from qwen3_export.core.recipe import load_recipe, recipe_names
from qwen3_export.core.source import open_source
from qwen3_export.ship.gguf import Options, export_gguf
from qwen3_export.solve.importance import calibrate
from qwen3_export.solve.job import QuantizeSettings
from qwen3_export.solve.quantize import quantize
from tests.reference import llama_quantize

SOLVED = "ours solved"
# A type whose rounding an importance matrix does not change.
UNWEIGHED = ("q8_0",)
WAYS = ("llama.cpp", "llama.cpp imatrix", "ours", "ours imatrix", SOLVED)


@dataclass(frozen=True)
class Bench:
    """One checkpoint, a folder for its files, and how much calibration text is used."""

    source: Path
    folder: Path
    samples: int
    sequence_length: int

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_source(str(self.source))

    @cached_property
    def settings(self) -> QuantizeSettings:
        return QuantizeSettings(samples=self.samples, sequence_length=self.sequence_length)

    @cached_property
    def plain(self) -> Path:
        """The 16-bit file that llama.cpp quantizes."""
        path = self.folder / "bf16.gguf"
        if not path.is_file():
            export_gguf(self.checkpoint, path, "bf16")
        return path

    @cached_property
    def importance(self) -> Imatrix:
        path = self.folder / "imatrix.gguf"
        if not path.is_file():
            calibrate(self.checkpoint, path, self.settings)
        return read_imatrix(path)

    def make(self, way: str, type_name: str) -> Path | None:
        """Write one file; None where no recipe is shipped for it."""
        path = self.folder / f"{type_name}-{way.replace(' ', '-')}.gguf"
        if way == SOLVED:
            return self._solved(path, type_name)
        weighed = way.endswith("imatrix")
        if weighed and type_name in UNWEIGHED:
            return None
        if way.startswith("ours"):
            options = Options(importance=self.importance if weighed else None)
            export_gguf(self.checkpoint, path, type_name, force=True, options=options)
            return path
        if type_name == "mxfp4":
            return None  # llama.cpp's quantizer has this type for experts alone
        means = {name: entry.means for name, entry in self.importance.entries.items()} if weighed else None
        llama_quantize.quantize(self.plain, path, FILE_TYPES[type_name].number, means)
        return path

    def solved(self, type_name: str) -> Path:
        """The folder that the type's recipe writes."""
        return self.folder / f"gguf-{type_name}" / self.source.name

    def _solved(self, path: Path, type_name: str) -> Path | None:
        recipe = f"gguf-{type_name}"
        if recipe not in recipe_names():
            return None
        folder = self.solved(type_name)
        shutil.rmtree(folder, ignore_errors=True)
        quantize(self.checkpoint, load_recipe(recipe), folder, self.settings)
        export_gguf(open_checkpoint(folder), path, force=True)
        return path


def wanted(types: list[str], ways: list[str]) -> Iterator[tuple[str, str]]:
    """Every file, type by type."""
    for type_name in types:
        for way in ways:
            yield type_name, way
