"""Dialogues whose facts are computed."""

from __future__ import annotations

import json
from datetime import date, timedelta

from .common import Content, Dice, World, cents, chat, listing, plural
from .dates import DAYS, long_date
from .number_words import chinese_number, roman, words

DISHES = {
    "pancakes": ("flour", "milk", "butter", "sugar"),
    "lentil soup": ("lentils", "carrots", "onions", "tomatoes"),
    "oat biscuits": ("oats", "butter", "sugar", "raisins"),
    "rice pudding": ("rice", "milk", "cream", "sugar"),
    "potato gratin": ("potatoes", "cream", "cheese", "onions"),
}


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
