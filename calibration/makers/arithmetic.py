"""Worked arithmetic."""

from __future__ import annotations

from fractions import Fraction
from math import gcd

from .common import Dice, World, cents, plural


def long_multiplication(dice: Dice, world: World) -> str:
    """Multiply two numbers digit by digit and check the result modulo nine."""
    a = world.number(dice) * 10 + dice.between(1, 9)
    b = world.number(dice)
    digits = [int(d) for d in str(b)][::-1]
    rows = [a * digit * 10**place for place, digit in enumerate(digits)]
    names = ("units", "tens", "hundreds")
    start = (
        f"Multiply {a} by {b} on paper.",
        f"Problem. Find the product {a} × {b} without a calculator.",
        f"How much is {a} times {b}? Work by rows.",
    )
    lines = [dice.pick(start), ""]
    for place, digit in enumerate(digits):
        shift = "" if place == 0 else f", shifted by {plural(place, 'place')}"
        lines.append(f"{names[place].capitalize()}: {a} × {digit} = {a * digit}{shift}: {rows[place]}")
    lines += ["", "Sum of the rows:", " + ".join(map(str, rows)) + f" = {a * b}", ""]
    left, right = a % 9, b % 9
    lines.append(
        f"Check by casting out nines: {a} leaves {left} and {b} leaves {right}; "
        f"{left} × {right} = {left * right} leaves {left * right % 9}, and {a * b} "
        f"leaves {a * b % 9}. Both agree, so {a} × {b} = {a * b}."
    )
    return "\n".join(lines)


def long_division(dice: Dice, world: World) -> str:
    """Divide with remainder, one digit of the dividend at a time."""
    divisor = world.factor(dice)
    dividend = world.number(dice) * 1000 + dice.between(0, 999)
    title = (
        f"Long division: {dividend} ÷ {divisor}",
        f"We divide {dividend} by {divisor} and keep the remainder.",
        f"Task: write {dividend} = {divisor} · q + r with 0 ≤ r < {divisor}.",
    )
    lines = [dice.pick(title), ""]
    rest = 0
    for digit in str(dividend):
        current = rest * 10 + int(digit)
        times = current // divisor
        rest = current - times * divisor
        lines.append(f"- bring down {digit}: {current} = {divisor} × {times} + {rest}")
    quotient, remainder = divmod(dividend, divisor)
    lines += [
        "",
        f"Reading the digits from top to bottom, q = {quotient} and r = {remainder}.",
        f"Proof: {divisor} × {quotient} = {divisor * quotient}, plus {remainder} gives {dividend}.",
    ]
    return "\n".join(lines)


def compound_interest(dice: Dice, world: World) -> str:
    """Tabulate a growing deposit."""
    balance = start = world.number(dice) * 1000
    rate = dice.between(15, 65)
    years = dice.between(4, 6)
    person = dice.pick(world.people)
    lines = [
        f"{person} deposits {cents(start)} at {rate / 10:.1f} percent a year; the "
        "interest is added at the end of every year and rounded to the cent.",
        "",
        "| year | balance at start | interest | balance at end |",
        "|-----:|-----------------:|---------:|---------------:|",
    ]
    for year in range(1, years + 1):
        interest = (balance * rate + 500) // 1000
        lines.append(f"| {year} | {cents(balance)} | {cents(interest)} | {cents(balance + interest)} |")
        balance += interest
    simple = start * rate * years // 1000
    lines += [
        "",
        f"With simple interest the gain would be {cents(simple)}; with compound "
        f"interest it is {cents(balance - start)}, which is "
        f"{cents(balance - start - simple)} more. As a formula, "
        f"$B_{{{years}}} = {cents(start)} \\cdot {1 + rate / 1000:.3f}^{{{years}}}$.",
    ]
    return "\n".join(lines)


def fractions(dice: Dice, world: World) -> str:
    """Add and subtract three fractions over a common denominator."""
    bottoms = dice.some([n for n in world.small if n > 3], 3)
    parts = [Fraction(dice.between(1, n - 1), n) for n in bottoms]
    common = 1
    for part in parts:
        common = common * part.denominator // gcd(common, part.denominator)
    tops = [int(part * common) for part in parts]
    total = parts[0] + parts[1] - parts[2]
    shown = [f"{p.numerator}/{p.denominator}" for p in parts]
    raw = tops[0] + tops[1] - tops[2]
    lines = [
        f"Simplify {shown[0]} + {shown[1]} - {shown[2]}.",
        "",
        f"The least common multiple of the denominators {', '.join(str(p.denominator) for p in parts)} is {common}.",
    ]
    for text, top, part in zip(shown, tops, parts, strict=True):
        lines.append(f"  {text} = {top}/{common}  (times {common // part.denominator})")
    lines.append(f"Numerators: {tops[0]} + {tops[1]} - {tops[2]} = {raw}, so the sum is {raw}/{common}.")
    shared = gcd(abs(raw), common)
    if shared > 1:
        lines.append(f"Cancel the factor {shared}: {total}.")
    else:
        lines.append("The fraction is already in lowest terms.")
    lines.append(f"As a decimal this is about {float(total):.4f}.")
    return "\n".join(lines)


UNITS = (
    ("miles", "kilometres", Fraction(1609344, 1000000)),
    ("pounds", "kilograms", Fraction(45359237, 100000000)),
    ("inches", "centimetres", Fraction(254, 100)),
    ("gallons", "litres", Fraction(3785411784, 1000000000)),
    ("knots", "km/h", Fraction(1852, 1000)),
    ("hectares", "square kilometres", Fraction(1, 100)),
)


def conversions(dice: Dice, world: World) -> str:
    """Convert a list of quantities and a few temperatures."""
    lines = [
        dice.pick(("Unit conversions", "Conversion sheet", "Units, worked out")),
        "",
    ]
    for index, (old, new, ratio) in enumerate(dice.some(UNITS, 4), start=1):
        amount = world.number(dice)
        lines.append(f"{index}. {amount} {old} × {float(ratio):g} = {float(amount * ratio):.2f} {new}")
    for index in (5, 6):
        celsius = dice.between(-30, 45)
        fahrenheit = Fraction(celsius * 9, 5) + 32
        lines.append(
            f"{index}. {celsius} °C: times 9/5 is {float(fahrenheit - 32):.1f}, plus 32 is {float(fahrenheit):.1f} °F"
        )
    seconds = world.number(dice) * 31
    minutes, rest = divmod(seconds, 60)
    lines.append(f"7. {seconds} s = {minutes} min {rest} s = {minutes // 60} h {minutes % 60} min {rest} s")
    return "\n".join(lines)


def chinese_problem(dice: Dice, world: World) -> str:
    """Pose and solve a work problem in Chinese."""
    a, b = dice.some([n for n in world.small if n > 3], 2)
    together = 1 / (Fraction(1, a) + Fraction(1, b))
    place = dice.pick(world.chinese_places)
    job = dice.pick(("修一段水渠", "铺一条小路", "粉刷一所学校", "收割一片麦田"))
    days = dice.between(1, min(a, b) - 2)
    done = Fraction(days, a)
    rest = (1 - done) * b
    return "\n".join(
        [
            f"【例题】{place}要{job}，甲队单独做需要{a}天，乙队单独做需要{b}天。",
            "（1）两队合做需要几天？",
            f"（2）若甲队先做{days}天，余下的由乙队单独完成，乙队还要做几天？",
            "",
            f"【解】把全部工作看作“1”，甲队每天完成1/{a}，乙队每天完成1/{b}。",
            f"（1）两队每天共完成 1/{a} + 1/{b} = {1 / together}，"
            f"所以需要 1 ÷ {1 / together} = {together} 天，约{float(together):.1f}天。",
            f"（2）甲队先完成 {days} × 1/{a} = {done}，还剩 {1 - done}。乙队需要 {1 - done} ÷ 1/{b} = {rest} 天。",
            f"答：合做约需{float(together):.1f}天；乙队还要做{float(rest):.1f}天。",
        ]
    )
