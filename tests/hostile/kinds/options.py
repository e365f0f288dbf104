"""Options with values too large, too small, of another kind, or for another command."""

from __future__ import annotations

from random import Random

from tests.hostile.trial import Place, Trial

_NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "100000",
    "2147483647",
    "2147483648",
    "9223372036854775808",
    "9" * 400,
    "1e3",
    "nan",
    "inf",
    "-inf",
    "0.5",
    "",
    " ",
    "x",
    "٣",
    "0x10",
    "1_0",
    "1" * 5000,
)
_WORDS = (
    "",
    "x",
    "cpu",
    "cuda",
    "CUDA:99",
    "\x01",
    "fp16",
    "ort",
    "../x",
    "é",
    "a" * 5000,
    "1,2",
    ",",
    "8.9",
    "99.9",
    "-",
)
_SIZES = ("0", "1", "8GiB", "1e9", "-1", "x", "9" * 400, "9" * 400 + "GiB", "8 GiB", "0.0000001", "١GiB", "", "1kib")


def make(random: Random, place: Place) -> Trial:
    """A sound input and a command with an odd option."""
    name = random.choice(sorted(_COMMANDS))
    base, options = _COMMANDS[name]
    command: list[object] = [*name.split(), *(place.base(part) if part in _BASES else part for part in base)]
    outputs = ()
    if name not in ("validate", "bench", "run", "plan"):
        command += ["--output", place.out]
        outputs = (place.out,)
    chosen = random.sample(sorted(options), min(len(options), random.choice((1, 1, 2))))
    for option in chosen:
        values = {"n": _NUMBERS, "w": _WORDS, "s": _SIZES}[options[option]]
        command.append(f"{option}={random.choice(values)}")
    codes = {0, 2, 3, 1} if name == "validate" else {0, 2, 3}
    if "--memory" in chosen:
        codes |= {4}
    return Trial(" ".join(str(part)[:60] for part in command[2:]), tuple(command), frozenset(codes), outputs=outputs)


_BASES = ("model", "onnx", "gguf", "reference", "quantized")
_SHORT = ("--samples", "2", "--sequence-length", "16")
_COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "quantize": (
        ("model", "--recipe", "rtn-w4a16-g32", *_SHORT),
        {
            "--samples": "n",
            "--sequence-length": "n",
            "--seed": "n",
            "--memory": "s",
            "--device": "w",
            "--threads": "n",
            "--layout": "w",
            "--recipe": "w",
            "--calibration": "w",
        },
    ),
    "onnx": (("quantized",), {"--flavor": "w", "--precision": "w", "--accuracy-level": "n", "--recipe": "w"}),
    "gguf": (("quantized",), {"--type": "w", "--recipe": "w"}),
    "reference": (
        ("model", "--tokens", "64", "--window", "32"),
        {"--tokens": "n", "--window": "n", "--top-k": "n", "--text": "w"},
    ),
    "calibrate": (
        ("model", *_SHORT),
        {"--samples": "n", "--sequence-length": "n", "--seed": "n", "--threads": "n", "--calibration": "w"},
    ),
    "recipes search": (
        ("model", "--target-bpw", "5", "--method", "rtn", *_SHORT, "--measure-rows", "1"),
        {"--target-bpw": "n", "--measure-rows": "n", "--method": "w", "--bits": "w", "--grids": "w", "--fold": "w"},
    ),
    "plan": (
        ("model", "--recipe", "rtn-w4a16-g32", "--no-time"),
        {"--format": "w", "--memory": "s", "--nodes": "n", "--layout": "w", "--samples": "n", "--output": "w"},
    ),
    "tasks": ((), {"--count": "n", "--seed": "n", "--kinds": "w"}),
    "tensorrt": (
        ("quantized", "--onnx-only"),
        {"--sm": "w", "--engine": "w", "--max-prompt": "n", "--max-context": "n", "--precision": "w"},
    ),
    "triton": (
        ("onnx",),
        {"--instances": "n", "--threads": "n", "--sequences": "n", "--queue": "n", "--name": "w", "--mount": "w"},
    ),
    "validate": (
        ("onnx", "--reference", "reference"),
        {"--max-kl": "n", "--min-top1": "n", "--max-ppl-ratio": "n", "--threads": "n", "--gate": "w"},
    ),
    "bench": (
        ("gguf", "--prompt-tokens", "8", "--new-tokens", "1", "--repeat", "1"),
        {"--prompt-tokens": "n", "--threads": "n", "--text": "w", "--new-tokens": "w"},
    ),
    "run": (
        ("gguf", "--prompt", "hi", "--max-new-tokens", "1"),
        {"--prompt": "w", "--system": "w", "--temperature": "n", "--top-p": "n", "--seed": "n", "--threads": "n"},
    ),
}
