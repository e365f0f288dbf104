"""The command `run`, which generates text: one prompt, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_export.cli.app import Json, Quiet, Verbose, app, console
from qwen3_export.cli.console import Console
from qwen3_export.cli.prove import RunDevice, ThinkingBudget, Threads, find
from qwen3_export.core.files import read_text
from qwen3_export.core.unread import no_effect
from qwen3_export.errors import InputError
from qwen3_export.run import limits


def _option(limit: limits.SamplingLimit, text: str) -> Any:
    """An option of a number between limits."""
    return typer.Option(min=limit.least, max=limit.most, help=text)


@app.command(epilog='Example: qwen3-export run model-onnx --prompt "What does ocean mean?" --max-new-tokens 32')
def run(
    artifact: Annotated[str, typer.Argument(help="ONNX, TensorRT or Hugging Face folder, or .gguf file.")],
    prompt: Annotated[str | None, typer.Option(help="What the user says; `-` reads it from stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file that says it.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A conversation: one line, one answer; an empty line ends.")] = (
        False
    ),
    system: Annotated[str | None, typer.Option(help="A system message before it.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking", help="Qwen3's switch.")] = True,
    thinking_budget: ThinkingBudget = None,
    max_new_tokens: Annotated[int, _option(limits.MAX_NEW_TOKENS, "Stop after this many tokens.")] = 256,
    temperature: Annotated[float, _option(limits.TEMPERATURE, "0 takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float | None, _option(limits.TOP_P, "Nucleus sampling; with a temperature (default: 0.95).")
    ] = None,
    seed: Annotated[int | None, _option(limits.SEED, "Of the sampling; with a temperature (default: 0).")] = None,
    threads: Threads = None,
    device: RunDevice = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Generate text with an artifact, chat template applied."""
    questions = _questions(prompt, prompt_file, chat)
    from qwen3_export.run.generate import Sampling, converse
    from qwen3_export.run.session import RuntimeOptions

    show = console(json, quiet, verbose)
    messages = [{"role": "system", "content": system}] if system else []
    _tell_unread(show, {"top_p": top_p, "seed": seed}, temperature, thinking, thinking_budget)
    usual = Sampling()
    nucleus, start = usual.top_p if top_p is None else top_p, usual.seed if seed is None else seed
    sampling = Sampling(max_new_tokens, temperature, nucleus, start, thinking_budget)
    on_text, on_answer = (None, _nothing) if json else (_stream, lambda found: _spoken(show, found))
    path, options = find(artifact, device), RuntimeOptions(threads=threads, device=device)
    try:
        found = converse(path, messages, questions, thinking, sampling, options, on_text, on_answer, show)
    except KeyboardInterrupt:
        if not json:
            print()  # keep the text generated so far
        raise
    if not found:
        raise InputError("nothing was said in the conversation", "one line of stdin is one question")
    show.result({**found[-1], "turns": found} if chat else found[0], _nothing)


def _tell_unread(
    show: Console, drawing: dict[str, Any], temperature: float, thinking: bool, budget: int | None
) -> None:
    """Warn of options of sampling and thinking that change nothing."""
    warnings = (
        no_effect(drawing if temperature == 0 else {}, "without a --temperature the likeliest token is taken"),
        no_effect({} if thinking else {"thinking_budget": budget}, "--no-thinking asks for no thought"),
    )
    for warning in filter(None, warnings):
        show.warn(warning)


def _questions(prompt: str | None, file: Path | None, chat: bool) -> Iterator[str]:
    """The prompts, from --prompt, --prompt-file or stdin.

    Raises InputError before anything is loaded, unless exactly one of them is given and has text.
    """
    given = [name for name, value in (("--prompt", prompt), ("--prompt-file", file), ("--chat", chat or None)) if value]
    if prompt == "" and not file and not chat:
        raise InputError("--prompt is empty", "say something to the model")
    if len(given) != 1:
        raise InputError(
            f"{' and '.join(given)} were given, one was expected" if given else "nothing to say to the model",
            "--prompt TEXT, --prompt - (stdin), --prompt-file FILE or --chat",
        )
    if chat:
        return _lines()
    text = _read(file) if file else sys.stdin.read() if prompt == "-" else prompt or ""
    if not text.strip():
        raise InputError(f"{given[0]}: the text is empty", "say something to the model")
    return iter([text])


def _read(file: Path) -> str:
    return read_text(file)


def _lines() -> Iterator[str]:
    """Lines of stdin until an empty one, with a prompt sign on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("you: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _nothing(*_values: Any) -> None:
    pass


def _spoken(show: Console, result: dict[str, Any]) -> None:
    print()
    cut = ", thought cut" if result["thought_was_cut"] else ""
    show.say(
        f"{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} per second, "
        f"the first after {result['first_token_seconds']:.2f} s, stop: {result['stop']}{cut}"
    )
