"""Dialogues, with and without thinking, whose facts are computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, timedelta
from itertools import pairwise, permutations
from math import gcd

from .common import (
    Content,
    Dice,
    Recipe,
    World,
    cents,
    chat,
    listing,
    plural,
    thinking,
)

DAYS = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
ONES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
TENS = (
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
)
Order = tuple[int, ...]
Clue = tuple[str, Callable[[Order], bool]]

DISHES = {
    "pancakes": ("flour", "milk", "butter", "sugar"),
    "lentil soup": ("lentils", "carrots", "onions", "tomatoes"),
    "oat biscuits": ("oats", "butter", "sugar", "raisins"),
    "rice pudding": ("rice", "milk", "cream", "sugar"),
    "potato gratin": ("potatoes", "cream", "cheese", "onions"),
}


def long_date(day: date) -> str:
    """Write a date such as 4 March 2021."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def recipe_scaling(dice: Dice, world: World) -> Content:
    """Scale a recipe, then answer a question about one ingredient."""
    dish = dice.pick(tuple(DISHES))
    base = dice.between(2, 4)
    wanted = base * dice.between(2, 3) + base // 2
    foods = dice.shuffled(DISHES[dish])
    grams = {food: dice.between(2, 40) * 10 for food in foods}
    first = ", ".join(f"{grams[food]} g {food}" for food in foods)
    scaled = "\n".join(f"- {food}: {grams[food] * wanted / base:.0f} g (was {grams[food]} g)" for food in foods)
    short = foods[dice.between(0, 3)]
    have = grams[short] * dice.between(11, 19) // 10
    servings = have * base / grams[short]
    person = dice.pick(world.people)
    return chat(
        f"My recipe for {dish} serves {base}: {first}. {person} and the others are coming, so I need it for {wanted}.",
        f"Multiply everything by {wanted / base:g}:\n\n{scaled}\n\nTaste before you "
        "season: salt and spices rarely need the full factor.",
        f"I only have {have} g of {short} in the house. How far does that go?",
        f"At {grams[short] / base:g} g a head it is enough for about {servings:.1f} "
        f"servings. For {wanted} you are short of "
        f"{grams[short] * wanted / base - have:.0f} g, so either buy that much more or "
        "make a smaller batch first.",
    )


def split_bill(dice: Dice, world: World) -> Content:
    """Split a bill with a tip among friends, one of whom left early."""
    people = dice.some(world.people, dice.between(3, 5))
    total, tip = dice.between(4000, 18000), dice.between(8, 15)
    with_tip = total + (total * tip + 50) // 100
    share, rest = divmod(with_tip, len(people))
    early, amount = people[-1], dice.between(9, 15) * 100
    others = len(people) - 1
    later, late_rest = divmod(with_tip - amount, others)
    spare = f" ({rest} cents are left over; round up.)" if rest else ""
    late_spare = f", with {late_rest} cents to spare" if late_rest else ""
    return chat(
        dice.pick(
            (
                f"We are {len(people)}: {listing(people)}. The bill is {cents(total)} "
                f"and we tip {tip} %. What does each of us pay?",
                f"Dinner came to {cents(total)}. Add {tip} percent and split it among {listing(people)}, please.",
            )
        ),
        f"The tip is {cents(with_tip - total)}, which makes {cents(with_tip)} in all. "
        f"Divided by {len(people)} that is {cents(share)} each.{spare}",
        f"{early} left before dessert and wants to give just {cents(amount)}.",
        f"Then {cents(with_tip - amount)} remains for the other {others} people: {cents(later)} each{late_spare}.",
    )


def to_json(dice: Dice, world: World) -> Content:
    """Extract fields from a sentence as JSON, then change one of them."""
    person, place = dice.pick(world.people), dice.pick(world.places)
    good, colour = dice.pick(world.goods), dice.pick(world.colours)
    count, day = dice.between(2, 30), world.iso_date(dice)
    record: dict[str, object] = {
        "name": person,
        "city": place,
        "item": good,
        "colour": colour,
        "count": count,
        "deliver_by": day,
    }
    changed = record | {"count": count + dice.between(1, 9), "colour": None}
    return [
        {
            "role": "system",
            "content": dice.pick(
                (
                    "Answer with a single JSON object and nothing else.",
                    "You turn order notes into JSON. Reply in JSON only.",
                    "Output valid JSON. Unknown values are null.",
                )
            ),
        },
        *chat(
            dice.pick(
                (
                    f"{person} from {place} would like {count} of the {good} in "
                    f"{colour}, to arrive no later than {day}.",
                    f"Note from the phone: {person}, {place}. {colour} {good}, {count} pieces. Deadline {day}!",
                )
            ),
            json.dumps(record),
            f"Correction: {changed['count']} pieces, and any colour will do.",
            json.dumps(changed),
        ),
    ]


def date_questions(dice: Dice, world: World) -> Content:
    """Answer questions about weekdays and spans of days."""
    start = date(*world.date(dice))
    span = dice.between(20, 190)
    end = start + timedelta(days=span)
    event = dice.pick(("the exhibition", "our lease", "the course", "the trial"))
    extra = dice.between(2, 6)
    return chat(
        f"{event.capitalize()} starts on {long_date(start)} and runs for {span} days. When is it over?",
        f"Counting {span} days on from {long_date(start)} brings you to {long_date(end)}, a {DAYS[end.weekday()]}.",
        "And what day of the week does it start?",
        f"It starts on a {DAYS[start.weekday()]}. {span} days are "
        f"{plural(span // 7, 'week')} and {plural(span % 7, 'day')}, which is why "
        + (
            "it also ends on the same weekday."
            if span % 7 == 0
            else f"the end falls {plural(span % 7, 'day')} later in the week."
        ),
        f"They may extend it by {extra} weeks.",
        f"In that case the new end would be {long_date(end + timedelta(weeks=extra))}, again a {DAYS[end.weekday()]}.",
    )


def sort_list(dice: Dice, world: World) -> Content:
    """Sort a list in two ways and count what is in it."""
    items = [
        (good, dice.between(1, 60), dice.between(100, 9000)) for good in dice.some(world.goods, dice.between(5, 6))
    ]
    given = "; ".join(f"{good} ({n} in stock, {cents(p)})" for good, n, p in items)
    by_price = sorted(items, key=lambda item: item[2])
    rare = [good for good, count, _ in items if count < 20]
    lines = "\n".join(f"{n}. {good}, {cents(p)}" for n, (good, _, p) in enumerate(by_price, start=1))
    worth = sum(count * p for _, count, p in items)
    return chat(
        f"Sort these from cheapest to dearest: {given}.",
        lines,
        dice.pick(("Which have fewer than 20 left?", "Anything below 20 in stock?")),
        f"{listing(rare).capitalize()}." if rare else "None: all have 20 or more.",
        "What is the whole stock worth?",
        f"Adding count times price for every line gives {cents(worth)}.",
    )


def chinese_shop(dice: Dice, world: World) -> Content:
    """Talk in Chinese about what a purchase costs."""
    goods = dice.some(world.chinese_goods, 2)
    prices = [dice.between(2, 45), dice.between(2, 45)]
    counts = [dice.between(2, 9), dice.between(2, 9)]
    total = sum(p * c for p, c in zip(prices, counts, strict=True))
    paid = (total // 50 + 1) * 50
    off = dice.between(7, 9)
    person = dice.pick(world.chinese_people)
    return chat(
        f"{person}买了{counts[0]}{goods[0]}，每{goods[0][0]}{prices[0]}元，"
        f"又买了{counts[1]}{goods[1]}，每{goods[1][0]}{prices[1]}元，一共多少钱？",
        f"{goods[0][1:]}：{counts[0]} × {prices[0]} = {counts[0] * prices[0]}元；"
        f"{goods[1][1:]}：{counts[1]} × {prices[1]} = {counts[1] * prices[1]}元。"
        f"合计{total}元。",
        f"付了{paid}元，应该找回多少？",
        f"{paid} - {total} = {paid - total}，应找回{paid - total}元。",
        f"如果全场打{off}折呢？",
        f"打{off}折就是原价的{off * 10}%："
        f"{total} × 0.{off} = {total * off / 10:.1f}元，"
        f"比原来便宜{total * (10 - off) / 10:.1f}元。",
    )


def numbers_in_words(dice: Dice, world: World) -> Content:
    """Write a number in words, in Roman numerals and in Chinese."""
    number = world.number(dice)
    year = dice.between(*world.years)
    return chat(
        f"Write {number} in words.",
        f"{words(number).capitalize()}.",
        f"And {year} as a Roman numeral?",
        f"{year} is {roman(year)}.",
        f"用中文数字怎么写{number}？",
        f"{number}写作“{chinese_number(number)}”。",
    )


def words(number: int) -> str:
    """Return the English words of a number below one thousand."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tail = f"-{ONES[number % 10]}" if number % 10 else ""
        return TENS[number // 10 - 2] + tail
    tail = f" and {words(number % 100)}" if number % 100 else ""
    return f"{ONES[number // 100]} hundred{tail}"


def roman(number: int) -> str:
    """Return a number as a Roman numeral."""
    table = (
        (1000, "M"),
        (900, "CM"),
        (500, "D"),
        (400, "CD"),
        (100, "C"),
        (90, "XC"),
        (50, "L"),
        (40, "XL"),
        (10, "X"),
        (9, "IX"),
        (5, "V"),
        (4, "IV"),
        (1, "I"),
    )
    out = ""
    for value, sign in table:
        out += sign * (number // value)
        number %= value
    return out


def chinese_number(number: int) -> str:
    """Return a number from 100 to 999 in Chinese characters."""
    digits = "零一二三四五六七八九"
    hundreds, tens, ones = (int(d) for d in str(number))
    out = digits[hundreds] + "百"
    if tens:
        out += digits[tens] + "十"
    elif ones:
        out += "零"
    return out + (digits[ones] if ones else "")


def time_zones(dice: Dice, world: World) -> Content:
    """Find the local times of a call between two places."""
    one, two = dice.some(world.places, 2)
    a, b = dice.some(dice.pick(((-8, -3, 0, 2), (-5, 1, 6, 9), (-6, 3, 5, 10))), 2)
    hour = dice.between(8, 11)
    minute = dice.pick((0, 15, 30, 45))
    there = hour + b - a
    shift = ("the day before", "the same day", "the next day")[there // 24 + 1]
    length = dice.between(35, 95)
    end = hour * 60 + minute + length
    return chat(
        f"My office in {one} is at UTC{a:+d}, the client in {two} at UTC{b:+d}. If I "
        f"call at {hour:02d}:{minute:02d} my time, what time is it for them?",
        f"{two} is {plural(abs(b - a), 'hour')} {'ahead of' if b > a else 'behind'} "
        f"{one}, so it is {there % 24:02d}:{minute:02d} there, {shift}.",
        f"The call takes {length} minutes.",
        f"Then it ends at {end // 60:02d}:{end % 60:02d} for you and at "
        f"{(end // 60 + b - a) % 24:02d}:{end % 60:02d} for them.",
    )


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


RECIPES = (
    Recipe("chat", recipe_scaling, 3, 1),
    Recipe("chat", split_bill, 3, 1),
    Recipe("chat", to_json, 3, 1),
    Recipe("chat", date_questions, 3, 1),
    Recipe("chat", sort_list, 3, 1),
    Recipe("chat", chinese_shop, 3, 1),
    Recipe("chat", numbers_in_words, 2, 1),
    Recipe("chat", time_zones, 3, 1),
    Recipe("chat-thinking", think_product, 2, 1),
    Recipe("chat-thinking", think_order, 3, 1),
    Recipe("chat-thinking", think_weekday, 2, 1),
    Recipe("chat-thinking", think_meeting, 2, 1),
    Recipe("chat-thinking", think_trace, 3, 1),
    Recipe("chat-thinking", think_chickens, 2, 1),
    Recipe("chat-thinking", think_price, 2, 1),
    Recipe("chat-thinking", think_letters, 2, 1),
    Recipe("chat-thinking", think_schedule, 2, 1),
    Recipe("chat-thinking", think_ratio, 2, 1),
)
