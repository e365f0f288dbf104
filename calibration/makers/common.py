"""What all makers share: the dice, the two worlds, and the list of recipes.

A maker is a function ``maker(dice, world)`` that returns the text of a document
or, for chats, its list of messages.  The *world* holds everything that differs
between the calibration and the held-out file: names, places, goods, years and
number ranges, which are disjoint, so that no generated document of one file can
turn up in the other.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Message = dict[str, str]
Content = str | list[Message]


class Dice:
    """Seeded random choices built on ``Random.random`` alone.

    Python promises the same numbers from an integer seed in every version for
    ``random()`` only, so nothing else of the module is used.
    """

    def __init__(self, seed: int) -> None:
        """Start the sequence of the given integer seed."""
        self._random = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[self.between(0, len(items) - 1)]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """Return the items in a random order."""
        rest = list(items)
        out = []
        while rest:
            out.append(rest.pop(self.between(0, len(rest) - 1)))
        return out

    def some(self, items: Iterable[T], count: int) -> list[T]:
        """Return ``count`` different items in a random order."""
        return self.shuffled(items)[:count]

    def chance(self, percent: int) -> bool:
        """Return True in the given percentage of cases."""
        return self.between(1, 100) <= percent

    def hex(self, digits: int) -> str:
        """Return a string of lower-case hexadecimal digits."""
        return "".join(self.pick("0123456789abcdef") for _ in range(digits))


@dataclass(frozen=True)
class World:
    """The names and ranges from which one of the two files is generated.

    The Chinese goods begin with their measure word, a single character.
    """

    name: str
    seed: int
    years: tuple[int, int]
    numbers: tuple[int, int]
    small: tuple[int, ...]
    people: tuple[str, ...]
    chinese_people: tuple[str, ...]
    places: tuple[str, ...]
    chinese_places: tuple[str, ...]
    goods: tuple[str, ...]
    chinese_goods: tuple[str, ...]
    services: tuple[str, ...]
    colours: tuple[str, ...]

    def number(self, dice: Dice) -> int:
        """Return a three-digit operand that belongs to this world."""
        return dice.between(*self.numbers)

    def factor(self, dice: Dice) -> int:
        """Return a small operand that belongs to this world."""
        return dice.pick(self.small)

    def date(self, dice: Dice) -> tuple[int, int, int]:
        """Return a year, month and day (1 to 28) of this world."""
        return dice.between(*self.years), dice.between(1, 12), dice.between(1, 28)

    def iso_date(self, dice: Dice) -> str:
        """Return a date of this world as YYYY-MM-DD."""
        return "{:04d}-{:02d}-{:02d}".format(*self.date(dice))


CALIBRATION = World(
    name="calibration",
    seed=20_240_117,
    years=(2019, 2024),
    numbers=(102, 689),
    small=(3, 4, 6, 7, 9, 12, 14, 17, 21, 23, 26, 29),
    people=(
        "Amara",
        "Bruno",
        "Celia",
        "Dmitri",
        "Esther",
        "Farid",
        "Greta",
        "Hugo",
        "Ines",
        "Jonas",
        "Kavya",
        "Leo",
        "Mirela",
        "Noor",
        "Oskar",
        "Priya",
        "Quentin",
        "Rosa",
        "Stefan",
        "Tala",
    ),
    chinese_people=("小明", "李华", "王芳", "张伟", "刘洋", "陈静", "赵磊", "周婷"),
    places=(
        "Ashford Mill",
        "Bellhaven",
        "Cold Spring",
        "Dunmore",
        "Eastbrook",
        "Fernhill",
        "Grey Harbour",
        "Hollin Bridge",
        "Islet Point",
        "Juniper Flats",
        "Kestrel Ridge",
        "Long Meadow",
    ),
    chinese_places=("青石镇", "临江市", "白云村", "东湖区", "柳河县", "南山路"),
    goods=(
        "desk lamp",
        "garden hose",
        "wool blanket",
        "copper kettle",
        "bread knife",
        "hiking boots",
        "paper notebook",
        "ceramic mug",
        "bicycle pump",
        "rain jacket",
        "wall clock",
        "storage box",
        "camping stove",
        "linen shirt",
        "tape measure",
        "picture frame",
    ),
    chinese_goods=(
        "支铅笔",
        "本笔记本",
        "斤苹果",
        "条毛巾",
        "只茶杯",
        "把雨伞",
        "盒饼干",
        "盏台灯",
    ),
    services=(
        "billing",
        "catalog",
        "gateway",
        "indexer",
        "mailer",
        "scheduler",
        "thumbs",
        "uploader",
    ),
    colours=("amber", "navy", "olive", "crimson", "ivory", "teal", "slate"),
)

HELDOUT = World(
    name="heldout",
    seed=77_003_911,
    years=(2026, 2029),
    numbers=(701, 987),
    small=(5, 8, 11, 13, 15, 16, 18, 19, 22, 24, 27, 31),
    people=(
        "Anneke",
        "Basil",
        "Chidi",
        "Delphine",
        "Emeka",
        "Fiona",
        "Gustav",
        "Hana",
        "Ivo",
        "Jacinta",
        "Kenji",
        "Lotte",
        "Mateus",
        "Nadia",
    ),
    chinese_people=("小红", "孙强", "吴敏", "郑浩", "林雪"),
    places=(
        "Marlow Cross",
        "Northgate",
        "Otter Falls",
        "Pinewood",
        "Quarry Bank",
        "Redcliff",
        "Saltmarsh",
        "Thornbury End",
    ),
    chinese_places=("松林镇", "平川市", "红叶谷", "西塘区"),
    goods=(
        "folding chair",
        "sewing kit",
        "cast iron pan",
        "sleeping bag",
        "fountain pen",
        "watering can",
        "oak shelf",
        "travel pillow",
        "hand drill",
        "glass jar",
        "door mat",
        "spice rack",
    ),
    chinese_goods=("块橡皮", "个书包", "斤橙子", "块肥皂", "只花盆"),
    services=("auth", "exporter", "ledger", "notifier", "search"),
    colours=("maroon", "beige", "violet", "turquoise", "charcoal"),
)

WORLDS = {world.name: world for world in (CALIBRATION, HELDOUT)}


@dataclass(frozen=True)
class Recipe:
    """A maker with its domain and the number of documents for each file."""

    domain: str
    make: Callable[[Dice, World], Content]
    calibration: int
    heldout: int

    def count(self, world: World) -> int:
        """Return how many documents of this recipe the world's file gets."""
        return self.calibration if world.name == "calibration" else self.heldout

    def dice(self, world: World, index: int) -> Dice:
        """Return the dice of one document, independent of all the others."""
        label = f"{self.domain}/{self.make.__name__}/{index}"
        return Dice(world.seed * 4_294_967_296 + zlib.crc32(label.encode()))


def chat(*turns: str) -> list[Message]:
    """Turn alternating user and assistant texts into messages."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


def thinking(question: str, thought: str, answer: str) -> list[Message]:
    """Return one question with an answer that begins with its thinking."""
    return chat(question, f"<think>\n{thought}\n</think>\n\n{answer}")


def listing(words: Sequence[str]) -> str:
    """Join words as in English prose: ``a, b and c``."""
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]


def plural(count: int, noun: str) -> str:
    """Return the count with its noun, with an s unless the count is one."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith(("x", "ch", "sh", "ss")):
        return f"{count} {noun}es"
    if noun.endswith("knife"):
        return f"{count} {noun[:-2]}ves"
    if noun.endswith("shelf"):
        return f"{count} {noun[:-1]}ves"
    if noun.endswith("boots"):
        return f"{count} pairs of {noun}"
    return f"{count} {noun}s"


def cents(amount: int) -> str:
    """Write an amount in cents with two decimals."""
    return f"{amount // 100}.{amount % 100:02d}"
