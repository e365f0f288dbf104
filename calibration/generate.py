#!/usr/bin/env python3
"""Write the bundled texts ``calibration.jsonl`` and ``heldout.jsonl``.

Usage::

    python calibration/generate.py                     write both files
    python calibration/generate.py --check             exit 1 if they differ
    python calibration/generate.py --stats T.json …    count tokens per domain

The hand-written documents come from ``sources/<file>/<domain>/*.txt``, the rest
from the seeded makers in ``makers/``.  The result is the same, byte for byte, on
every machine and with every Python from 3.11.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makers.common import WORLDS, Content, Dice, Message, World
from makers.recipes import RECIPES

HERE = Path(__file__).resolve().parent
SPLITS = tuple(WORLDS)
DOMAINS = (
    "english",
    "chinese",
    "code",
    "math",
    "structured",
    "chat",
    "chat-thinking",
)
DOCUMENT_LINE = re.compile(r"^=== doc: (\S+) ===\n", re.MULTILINE)
TURN_LINE = re.compile(r"^--- (system|user|assistant) ---\n", re.MULTILINE)
NGRAM = 12


@dataclass(frozen=True)
class Document:
    """One line of a JSONL file."""

    name: str
    domain: str
    content: Content

    def line(self) -> str:
        """Return the document as a line of JSON."""
        key = "text" if isinstance(self.content, str) else "messages"
        record = {"id": self.name, "domain": self.domain, key: self.content}
        return json.dumps(record, ensure_ascii=False) + "\n"


def split_marked(text: str, marker: re.Pattern[str]) -> list[tuple[str, str]]:
    """Return the (label, body) pairs of a text cut at its marker lines."""
    head, *rest = marker.split(text)
    if head.strip():
        raise ValueError(f"text before the first marker: {head.strip()[:60]!r}")
    return [(label, body.strip("\n")) for label, body in zip(rest[::2], rest[1::2], strict=True)]


def parse_chat(text: str) -> list[Message]:
    """Return the messages of a hand-written dialogue."""
    return [{"role": role, "content": body} for role, body in split_marked(text, TURN_LINE)]


def written_documents(split: str) -> Iterator[Document]:
    """Yield the hand-written documents of one file."""
    for domain in DOMAINS:
        for path in sorted((HERE / "sources" / split / domain).glob("*.txt")):
            text = path.read_text(encoding="utf-8")
            for label, body in split_marked(text, DOCUMENT_LINE):
                is_chat = domain.startswith("chat")
                content: Content = parse_chat(body) if is_chat else body + "\n"
                yield Document(f"{domain}/{label}", domain, content)


def made_documents(world: World) -> Iterator[Document]:
    """Yield the generated documents of one file."""
    for recipe in RECIPES:
        for index in range(recipe.count(world)):
            content = recipe.make(recipe.dice(world, index), world)
            if isinstance(content, str):
                content = content.rstrip("\n") + "\n"
            label = recipe.make.__name__.replace("_", "-")
            name = f"{recipe.domain}/made-{label}-{index + 1}"
            yield Document(name, recipe.domain, content)


def documents(split: str) -> list[Document]:
    """Return all documents of one file, the domains evenly interleaved.

    Within a domain the order is shuffled; across domains each document goes to
    its relative place, so that any long enough prefix of the file is balanced.
    """
    world = WORLDS[split]
    every = [*written_documents(split), *made_documents(world)]
    placed = []
    for rank, domain in enumerate(DOMAINS):
        group = [document for document in every if document.domain == domain]
        dice = Dice(world.seed + rank)
        for index, document in enumerate(dice.shuffled(group)):
            placed.append(((index + 0.5) / len(group), rank, document))
    return [document for _, _, document in sorted(placed, key=lambda item: item[:2])]


def build(split: str) -> bytes:
    """Return the contents of one JSONL file."""
    every = documents(split)
    names = Counter(document.name for document in every)
    repeated = sorted(name for name, count in names.items() if count > 1)
    if repeated:
        raise ValueError(f"{split}: repeated ids: {', '.join(repeated)}")
    return "".join(document.line() for document in every).encode()


def target(split: str) -> Path:
    """Return the path of one JSONL file."""
    return HERE / f"{split}.jsonl"


def write() -> int:
    """Write both files."""
    for split in SPLITS:
        target(split).write_bytes(build(split))
    return 0


def check() -> int:
    """Return 1 if a file on disk is not what ``write`` would write."""
    status = 0
    for split in SPLITS:
        path = target(split)
        if not path.exists() or path.read_bytes() != build(split):
            print(f"{path.name} is out of date: run python calibration/generate.py")
            status = 1
    return status


def render(content: Content) -> str:
    """Return the text of a document, a chat in the Qwen3 chat format.

    As in the model's own template, thinking stays only in the answer to the last
    question, and a last answer without any gets an empty thinking block.
    """
    if isinstance(content, str):
        return content
    last_question = max(i for i, m in enumerate(content) if m["role"] == "user")
    parts = []
    for index, message in enumerate(content):
        body = message["content"]
        if message["role"] == "assistant":
            thought, _, answer = body.rpartition("</think>")
            thought = thought.replace("<think>", "").strip("\n")
            body = answer.lstrip("\n")
            if index > last_question:
                body = f"<think>\n{thought}\n</think>\n\n{body}"
        parts.append(f"<|im_start|>{message['role']}\n{body}<|im_end|>\n")
    return "".join(parts)


def duplicate_share(sequences: list[list[int]]) -> float:
    """Return the share of token n-grams that occurred earlier in the file."""
    seen: set[tuple[int, ...]] = set()
    total = repeats = 0
    for ids in sequences:
        for start in range(len(ids) - NGRAM + 1):
            gram = tuple(ids[start : start + NGRAM])
            total += 1
            repeats += gram in seen
            seen.add(gram)
    return repeats / max(total, 1)


def count_tokens(tokenizer: Any, split: str) -> tuple[dict[str, int], float]:
    """Return the number of tokens of each document and the share of repeats."""
    sequences = {}
    for document in documents(split):
        text = render(document.content)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        sequences[document.name] = ids
    counts = {name: len(ids) for name, ids in sequences.items()}
    return counts, duplicate_share(list(sequences.values()))


def table(split: str, tokenizers: list[Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table of documents and tokens per domain."""
    counted = [count_tokens(tokenizer, split) for tokenizer in tokenizers]
    yield "| domain | documents | hand-written |" + "".join(
        f" tokens ({tokenizer.get_vocab_size():,} entries) | share |" for tokenizer in tokenizers
    )
    yield "|---|---:|---:|" + "---:|---:|" * len(tokenizers)
    every = documents(split)
    first = counted[0][0]
    for domain in (*DOMAINS, "all"):
        group = [d for d in every if domain in (d.domain, "all")]
        written = sum(first[d.name] for d in group if "/made-" not in d.name)
        line = f"| {domain} | {len(group)} "
        line += f"| {written / max(1, sum(first[d.name] for d in group)):.0%} |"
        for counts, _ in counted:
            tokens = sum(counts[d.name] for d in group)
            line += f" {tokens:,} | {tokens / sum(counts.values()):.1%} |"
        yield line
    shares = " and ".join(f"{share:.1%}" for _, share in counted)
    yield f"\nShare of {NGRAM}-grams of tokens that occur a second time: {shares}."


def stats(tokenizer_files: list[str]) -> int:
    """Print the statistics of both files under one or more tokenizers."""
    from tokenizers import Tokenizer

    tokenizers = [Tokenizer.from_file(path) for path in tokenizer_files]
    for split in SPLITS:
        print(f"`{target(split).name}`\n")
        print("\n".join(table(split, tokenizers)) + "\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="exit 1 on differences")
    group.add_argument(
        "--stats",
        metavar="TOKENIZER_JSON",
        nargs="+",
        help="count documents and tokens per domain (needs the package tokenizers)",
    )
    options = parser.parse_args(arguments)
    if options.check:
        return check()
    if options.stats:
        return stats(options.stats)
    return write()


if __name__ == "__main__":
    sys.exit(main())
