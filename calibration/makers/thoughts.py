"""Dialogues with thinking: puzzles whose solution is computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations
from math import gcd

from .common import Content, Dice, World, cents, listing, plural, thinking
from .dates import DAYS

Order = tuple[int, ...]


Clue = tuple[str, Callable[[Order], bool]]


def think_product(dice: Dice, world: World) -> Content:
    """Multiply in the head with a check."""
    a, b = world.number(dice), world.factor(dice)
    ones, near = a % 10, round(a, -2)
    high = a - ones
    good = dice.pick(world.goods)
    return thinking(
        dice.pick(
            (
                f"What is {a} × {b}?",
                f"A shop sells {plural(a, good)} at {b} each. What does it take in?",
                f"Work out {b} lots of {a}.",
            )
        ),
        f"I split {a} into {high} and {ones}. {high} × {b} = {high * b}. "
        f"{ones} × {b} = {ones * b}. The sum is {high * b} + {ones * b} = {a * b}.\n"
        f"A rough check: {a} is near {near}, and {near} × {b} = {near * b}, which is "
        f"of the right size. The last digit should be that of {ones} × {b % 10} = "
        f"{ones * (b % 10)}, namely {a * b % 10}. It is.",
        f"{a} × {b} = **{a * b}**.",
    )


def think_order(dice: Dice, world: World) -> Content:
    """Solve a puzzle about the order of runners from clues that fix it."""
    names = dice.some(world.people, 4)
    clues, solutions = ordering_clues(dice, names)
    steps = []
    left = list(permutations(range(4)))
    for text, test in clues:
        left = [order for order in left if test(order)]
        steps.append(f"“{text}” leaves {plural(len(left), 'possible order')}.")
    order = sorted(range(4), key=lambda i: solutions[i])
    result = ", ".join(names[i] for i in order)
    event = dice.pick(("race", "spelling contest", "quiz", "swimming final"))
    return thinking(
        f"{listing(names)} took part in a {event}, and there were no ties. "
        + " ".join(text for text, _ in clues)
        + " In what order did they finish?",
        "Four people can finish in 24 orders. I apply the clues one at a time.\n"
        + "\n".join(steps)
        + f"\nThe one that is left is {result}. Reading the clues again: all hold.",
        f"From first to last: {result}.",
    )


def ordering_clues(dice: Dice, names: list[str]) -> tuple[list[Clue], Order]:
    """Return clues with their tests, enough to fix one order, and that order."""
    places = tuple(dice.shuffled(range(4)))
    ordinals = ("first", "second", "third", "last")
    pool: list[Clue] = []
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i != j and places[i] < places[j]:
                text = f"{a} finished before {b}."
                if dice.chance(50):
                    text = f"{b} came in after {a}."
                pool.append((text, lambda p, i=i, j=j: p[i] < p[j]))
            if i < j and abs(places[i] - places[j]) != 1:
                text = f"{a} and {b} were not next to each other."
                pool.append((text, lambda p, i=i, j=j: abs(p[i] - p[j]) != 1))
            if places[i] + 1 == places[j]:
                text = f"{b} came in directly behind {a}."
                pool.append((text, lambda p, i=i, j=j: p[i] + 1 == p[j]))
        wrong = dice.pick([k for k in range(4) if k != places[i]])
        text = f"{a} was not {ordinals[wrong]}."
        pool.append((text, lambda p, i=i, w=wrong: p[i] != w))
    chosen = []
    left = list(permutations(range(4)))
    for text, test in dice.shuffled(pool):
        kept = [order for order in left if test(order)]
        if len(kept) < len(left):
            chosen.append((text, test))
            left = kept
        if len(left) == 1:
            break
    return chosen, left[0]


def think_weekday(dice: Dice, world: World) -> Content:
    """Find a weekday a number of days ahead."""
    start, ahead = dice.between(0, 6), world.number(dice)
    weeks, rest = divmod(ahead, 7)
    end = (start + rest) % 7
    walk = " → ".join(DAYS[(start + k) % 7] for k in range(rest + 1))
    return thinking(
        dice.pick(
            (
                f"Today is {DAYS[start]}. Which day of the week is it in {ahead} days?",
                f"If a parcel posted on a {DAYS[start]} takes {ahead} days, on what weekday does it arrive?",
            )
        ),
        f"Weekdays repeat every 7 days. {ahead} = 7 × {weeks} + {rest}, so only the "
        f"remainder {rest} matters. " + (f"Stepping on: {walk}." if rest else f"It stays {DAYS[start]}."),
        f"It will be a **{DAYS[end]}**.",
    )


def think_meeting(dice: Dice, world: World) -> Content:
    """Find when two travellers meet."""
    one, two = dice.some(world.people, 2)
    near, far = dice.some(world.places, 2)
    a, b = dice.between(4, 19), dice.between(12, 28)
    quarters = dice.between(2, 11)
    minutes, hours = quarters * 15, f"{quarters / 4:g}"
    distance = f"{(a + b) * quarters / 4:g}"
    mine, theirs = f"{a * quarters / 4:g}", f"{b * quarters / 4:g}"
    start = dice.between(7, 14) * 60 + dice.pick((0, 10, 25, 40))
    begin, meet = stamp(start), stamp(start + minutes)
    return thinking(
        f"{one} sets out from {near} at {begin} and travels at {a} km/h towards {far}. "
        f"{two} leaves {far} at the same moment and comes the other way at {b} km/h. "
        f"The road is {distance} km long. When do they meet, and how far from {near}?",
        f"They approach each other, so the speeds add: {a} + {b} = {a + b} km/h. The "
        f"gap of {distance} km closes in {distance}/{a + b} = {hours} h, which is "
        f"{minutes} minutes. {begin} plus {minutes} minutes is {meet}. In that time "
        f"{one} covers {a} × {hours} = {mine} km, and {two} {theirs} km; together "
        f"{distance} km, as it should be.",
        f"They meet at {meet}, {mine} km from {near}.",
    )


def think_trace(dice: Dice, world: World) -> Content:
    """Trace a short loop by hand."""
    start, step, limit = world.factor(dice), dice.between(2, 5), dice.between(5, 7)
    mod = dice.between(3, 5)
    name = dice.pick(("total", "acc", "score", "x"))
    code = (
        f"{name} = {start}\nfor i in range(1, {limit}):\n    if i % {mod} == 0:\n"
        f"        {name} *= 2\n    else:\n        {name} += {step} * i\nprint({name})"
    )
    value = start
    rows = []
    for i in range(1, limit):
        before = value
        value = value * 2 if i % mod == 0 else value + step * i
        action = "doubled" if i % mod == 0 else f"plus {step * i}"
        rows.append(f"i = {i}: {before} {action} → {value}")
    return thinking(
        dice.pick(("What does this print?", "Give the output of this program.")) + f"\n\n```python\n{code}\n```",
        f"{name} starts at {start}; i runs from 1 to {limit - 1}.\n" + "\n".join(rows),
        f"It prints `{value}`.",
    )


def think_chickens(dice: Dice, world: World) -> Content:
    """Solve the old puzzle of heads and legs in Chinese."""
    chickens, rabbits = world.factor(dice), world.factor(dice)
    heads, legs = chickens + rabbits, 2 * chickens + 4 * rabbits
    person = dice.pick(world.chinese_people)
    return thinking(
        f"{person}家的院子里有鸡和兔共{heads}只，一共有{legs}条腿。鸡和兔各有多少只？",
        f"先假设全是鸡，那么腿数是 2 × {heads} = {2 * heads}，"
        f"比实际少 {legs} - {2 * heads} = {legs - 2 * heads}。"
        "把一只鸡换成一只兔，腿数增加2，"
        f"所以兔子有 {legs - 2 * heads} ÷ 2 = {rabbits} 只，"
        f"鸡有 {heads} - {rabbits} = {chickens} 只。\n"
        f"验算：{chickens} × 2 + {rabbits} × 4 = {legs}，正确。",
        f"鸡有**{chickens}**只，兔有**{rabbits}**只。",
    )


def think_price(dice: Dice, world: World) -> Content:
    """Compare the prices of two packs."""
    small, large = dice.between(150, 450), dice.between(500, 1200)
    one, two = dice.between(180, 520), dice.between(560, 1300)
    per_one, per_two = one * 1000 / small, two * 1000 / large
    better = "small" if per_one < per_two else "large"
    food = dice.pick(("coffee", "rice", "olives", "honey", "muesli", "almonds"))
    person = dice.pick(world.people)
    return thinking(
        f"A small pack of {food} holds {small} g and costs {cents(one)}, a large one "
        f"{large} g for {cents(two)}. Which should {person} buy to pay less per "
        "kilogram?",
        "Price per kilogram is price divided by grams, times 1000.\n"
        f"Small: {cents(one)} / {small} × 1000 = {per_one / 100:.2f}.\n"
        f"Large: {cents(two)} / {large} × 1000 = {per_two / 100:.2f}.\n"
        f"The {better} pack is cheaper. Worth adding that a lower price only helps if "
        "all of it gets used up.",
        f"The **{better}** pack: {min(per_one, per_two) / 100:.2f} per kilogram, not "
        f"{max(per_one, per_two) / 100:.2f}.",
    )


def think_letters(dice: Dice, world: World) -> Content:
    """Count a letter in a phrase, place by place."""
    phrase = dice.pick(world.colours) + " " + dice.pick(world.goods)
    letters = [c for c in phrase if c != " "]
    letter = dice.pick(sorted(set(letters)))
    spelled = "-".join(letters)
    spots = [str(n) for n, c in enumerate(letters, start=1) if c == letter]
    count = len(spots)
    return thinking(
        f'How many times does the letter "{letter}" occur in "{phrase}"?',
        f"Spelled out without the spaces: {spelled}. That is {len(letters)} letters. "
        f'"{letter}" stands at {"places" if count > 1 else "place"} {listing(spots)}. '
        f"So the count is {count}.",
        f'The letter "{letter}" occurs {"once" if count == 1 else f"{count} times"}.',
    )


def think_schedule(dice: Dice, world: World) -> Content:
    """Find the first gap in a day's appointments."""
    now = 9 * 60
    busy = []
    for _ in range(4):
        begin = now + dice.pick((0, 10, 15, 20, 35))
        end = begin + dice.pick((25, 40, 45, 60, 75))
        busy.append((begin, end))
        now = end
    need = dice.pick((30, 40, 45))
    edges = [(9 * 60, 9 * 60), *busy, (17 * 60, 17 * 60)]
    rows, found = [], None
    for (_, end), (begin, _) in pairwise(edges):
        rows.append(f"{stamp(end)} to {stamp(begin)}: {begin - end} minutes")
        if begin - end >= need:
            found = end
            break
    shown = ", ".join(f"{stamp(a)}–{stamp(b)}" for a, b in busy)
    one, two = dice.some(world.people, 2)
    answer = f"{stamp(found)}–{stamp(found + need)}" if found is not None else "none"
    return thinking(
        f"{one}'s calendar between 9:00 and 17:00 shows {shown}. {two} needs {need} "
        "minutes with them. What is the earliest slot?",
        "I list the gaps in order until one is long enough.\n"
        + "\n".join(rows)
        + f"\nThe last of these has the {need} minutes.",
        f"The earliest slot is {answer}.",
    )


def stamp(minutes: int) -> str:
    """Write minutes of the day as H:MM."""
    return f"{minutes // 60}:{minutes % 60:02d}"


def think_ratio(dice: Dice, world: World) -> Content:
    """Share an amount in a ratio."""
    parts = dice.some([n for n in world.small if n < 20], 3)
    unit = dice.between(4, 60)
    total = sum(parts) * unit
    names = dice.some(world.people, 3)
    shares = [unit * part for part in parts]
    divisor = gcd(gcd(parts[0], parts[1]), parts[2])
    simpler = " : ".join(str(part // divisor) for part in parts)
    hint = f" (that is {simpler} in lowest terms)" if divisor > 1 else ""
    return thinking(
        f"Share {total} marbles among {listing(names)} in the ratio "
        f"{' : '.join(map(str, parts))}. How many does everyone get?",
        f"The ratio{hint} has {' + '.join(map(str, parts))} = {sum(parts)} parts. One "
        f"part is {total} / {sum(parts)} = {unit} marbles. "
        + " ".join(
            f"{name}: {part} × {unit} = {share}." for name, part, share in zip(names, parts, shares, strict=True)
        )
        + f" Together {' + '.join(map(str, shares))} = {sum(shares)}: all of them.",
        "\n".join(f"- {name}: {share}" for name, share in zip(names, shares, strict=True)),
    )
