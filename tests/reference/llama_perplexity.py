"""llama.cpp's `llama-perplexity --kl-divergence`: the program, its base file and its table.

The program comes from Debian's testing release: its packages are unpacked into a folder of the test's own and run
with the C library they bring. `python -m tests.reference.llama_perplexity` prints a new table for
`llama_perplexity.txt`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3_export.core.source import open_source
from qwen3_export.ship.gguf import export_gguf
from qwen3_export.text.documents import load_documents

RELEASE, PACKAGE = "forky", "llama.cpp-tools-extra"
# Length of the program's rows, of which it scores the second half; fp32 products, so that builds agree.
ROW, ROWS = 128, 16
EXACT = ("-c", ROW, "-b", ROW, "-t", 1, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-repack")
_APT = """
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Acquire::Languages "none";
APT::Sandbox::User "root";
Debug::NoLocking "true";
"""
# Label of a printed line → our name of the figure.
_LINES = {
    "Mean PPL(Q)": "ppl_artifact.mean",
    "Mean PPL(base)": "ppl_reference.mean",
    "Cor(ln(PPL(Q)), ln(PPL(base)))": "logprob_correlation",
    "Mean ln(PPL(Q)/PPL(base))": "log_ppl_ratio.mean",
    "Mean PPL(Q)/PPL(base)": "ppl_ratio.mean",
    "Mean PPL(Q)-PPL(base)": "ppl_difference.mean",
    "RMS Δp": "probability_change.rms",
    "Same top p": "same_top.mean",
}
_KINDS = {"KLD": "kl", "Δp": "probability_change"}
_PARTS = {
    "Mean": "mean",
    "Maximum": "max",
    "Median": "median",
    "Minimum": "min",
    "99.9%": "p99_9",
    "99.0%": "p99",
    "95.0%": "p95",
    "90.0%": "p90",
    "75.0%": "p75",
    "25.0%": "p25",
    "10.0%": "p10",
    "5.0%": "p5",
    "1.0%": "p1",
    "0.1%": "p0_1",
}


@dataclass(frozen=True)
class Printed:
    """A printed figure: its value, and half a unit of its last digit."""

    value: float
    half: float


class Unavailable(Exception):
    """The program is not here and cannot be fetched."""


def program(folder: Path) -> tuple[list[str], Path]:
    """The command and its working directory, fetched into `folder` unless installed."""
    here = shutil.which("llama-perplexity")
    return ([here], folder) if here else _unpacked(folder)


def _unpacked(folder: Path) -> tuple[list[str], Path]:
    tools = ("apt-get", "dpkg-deb")
    if not all(map(shutil.which, tools)):
        raise Unavailable("this is no Debian")
    found = _output("apt-get", "indextargets", "--format", "$(SITE) $(COMPONENT) $(ORIGIN)").splitlines()
    sites = [line.split()[0] for line in found if line.endswith(" main Debian") and "security" not in line]
    if not sites:
        raise Unavailable("no archive of Debian is configured")
    for name in ("lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(f"deb {sites[0]} {RELEASE} main\n")
    (folder / "apt.conf").write_text(_APT.format(folder=folder))
    apt = ("apt-get", "-qq", "-c", folder / "apt.conf")
    _output(*apt, "update")
    _output(*apt, "install", "--download-only", "--no-install-recommends", "--yes", PACKAGE)
    root = folder / "root"
    for package in sorted((folder / "cache" / "archives").glob("*.deb")):
        _output("dpkg-deb", "-x", package, root)
    (library,) = {path.parent for path in root.glob("usr/lib/*/libllama.so.*")}
    loader = next(path for path in sorted(root.glob("usr/lib*/ld-linux*")) if path.exists())
    # The program looks for the libraries of processor types in its working directory.
    backends = next(library.glob("ggml/backends*"))
    libraries = f"{library}:{library / 'llama'}"
    return [str(loader), "--library-path", libraries, str(root / "usr/bin/llama-perplexity")], backends


def _output(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{command[0]}: {done.stderr.strip()[-200:]}")
    return done.stdout


def run(command: tuple[list[str], Path], *arguments: object, wanted: str) -> str:
    """Run the program until its output holds `wanted`; returns what it prints.

    Its log thread sometimes ends before everything is written.
    """
    words, folder = command
    for _ in range(10):
        done = subprocess.run(
            [*words, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        if wanted in done.stdout + done.stderr:
            return done.stdout
    raise AssertionError(done.stdout[-500:])


def base_answers(path: Path) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Token ids `[rows, row]` and log-probabilities `[rows, scored, vocab]` of a base file.

    The file: `_logits_`, row length, vocabulary, rows, token ids, then for every scored position a step and the
    least log-probability in fp32, and 16 bits per token.
    """
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    row, vocab, rows = (int(number) for number in np.frombuffer(data, np.int32, 3, 8))
    ids = np.frombuffer(data, np.int32, row * rows, 20).reshape(rows, row)
    width = 2 * ((vocab + 1) // 2) + 4
    kept = np.frombuffer(data, np.uint16, offset=20 + 4 * row * rows).reshape(rows, -1, width)
    step_and_least = np.ascontiguousarray(kept[..., :4]).view(np.float32)
    steps = kept[..., 4 : 4 + vocab].astype(np.float32)
    return ids, step_and_least[..., :1] * steps + step_and_least[..., 1:]


def parsed(table: str) -> dict[str, Printed]:
    """Every figure of a printed table, by our names; percentages become shares."""
    found = {}
    for line in table.splitlines():
        label, colon, rest = line.rpartition(":")
        values = re.findall(r"-?\d+\.\d+", rest)
        if line.startswith("#") or not colon or not values:
            continue
        name = _name(" ".join(label.split()))
        scale = 0.01 if "%" in rest else 1.0
        for text, end in zip(values, ("", "stderr"), strict=False):
            half = 0.5 * 10.0 ** -len(text.partition(".")[2])
            part = f"{name.rpartition('.')[0]}.{'rms_' if name.endswith('rms') else ''}{end}" if end else name
            found[part] = Printed(scale * float(text), scale * half)
    return found


def _name(label: str) -> str:
    if label in _LINES:
        return _LINES[label]
    part, _, kind = label.rpartition(" ")
    return f"{_KINDS[kind]}.{_PARTS[part]}"


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Original and 4-bit artifact as GGUF files in fp32, and a text."""
    made = []
    for kind in ("f16", "q4_0"):
        export_gguf(open_source("reference-model"), folder / f"{kind}-packed.gguf", kind)
        made.append(_widened(folder / f"{kind}-packed.gguf", folder / f"{kind}.gguf"))
    text = folder / "text.txt"
    documents = [item.content for item in load_documents("heldout") if isinstance(item.content, str)]
    text.write_text("\n\n".join(documents)[: 6 * ROW * ROWS], encoding="utf-8")
    return made[0], made[1], text


def _widened(packed: Path, output: Path) -> Path:
    """Write a copy of the file with every tensor in fp32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader, writer = GGUFReader(packed), GGUFWriter(output, "qwen3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            item = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def printed_by(command: tuple[list[str], Path], inputs: Sequence[Path], base: Path) -> str:
    """The table that the program prints of the artifact beside the original's base file."""
    original, artifact, text = inputs
    run(command, "-m", original, "-f", text, "--chunks", ROWS, *EXACT, "--kl-divergence-base", base, wanted="PPL")
    compare = ("-m", artifact, *EXACT, "--kl-divergence-base", base, "--kl-divergence")
    out = run(command, *compare, wanted="Same top p:")
    return out[out.index("====== Perplexity statistics") :].strip() + "\n"


def main() -> None:
    """Print a table for the stored file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = program(folder)
        version = subprocess.run([*command[0], "--version"], cwd=command[1], capture_output=True, text=True, check=True)
        print(f"# {(version.stdout + version.stderr).splitlines()[0]}")
        print(printed_by(command, make_inputs(folder), folder / "base.bin"), end="")


if __name__ == "__main__":
    main()
