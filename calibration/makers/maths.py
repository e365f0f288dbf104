"""Worked mathematics: arithmetic, algebra, number theory and calculus."""

from __future__ import annotations

from fractions import Fraction
from math import comb, gcd, isqrt

from .common import Dice, Recipe, World, cents, plural


def signed(value: int, tail: str = "", first: bool = False) -> str:
    """Write ``+ 3x`` or ``- 3x`` as a term of a sum, without a coefficient of 1."""
    sign = "-" if value < 0 else ("" if first else "+")
    size = abs(value)
    body = tail if tail and size == 1 else f"{size}{tail}"
    return f"{sign}{body}" if first else f"{sign} {body}"


def polynomial(coefficients: list[int]) -> str:
    """Write a polynomial in x, highest power first, from its coefficients."""
    parts: list[str] = []
    degree = len(coefficients) - 1
    for index, value in enumerate(coefficients):
        if value:
            power = degree - index
            tail = "" if power == 0 else "x" if power == 1 else f"x^{power}"
            parts.append(signed(value, tail, first=not parts))
    return " ".join(parts) or "0"


def value_at(coefficients: list[int], x: int) -> int:
    """Return the value of a polynomial by Horner's rule."""
    total = 0
    for value in coefficients:
        total = total * x + value
    return total


def latex(value: Fraction) -> str:
    """Write a fraction in LaTeX."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


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


def euclid(dice: Dice, world: World) -> str:
    """Find a greatest common divisor and write it as a combination."""
    common = world.factor(dice)
    a = common * dice.between(40, 160)
    b = common * dice.between(12, 39)
    lines = [
        dice.pick(
            (
                f"Find gcd({a}, {b}) and integers x, y with {a}x + {b}y = gcd.",
                f"The extended Euclidean algorithm for {a} and {b}",
                f"Which is the greatest common divisor of {a} and {b}, and how can "
                "it be written as a combination of the two?",
            )
        ),
        "",
        "| r | q | x | y |",
        "|---|---|---|---|",
        f"| {a} |  | 1 | 0 |",
        f"| {b} |  | 0 | 1 |",
    ]
    old, new = (a, 1, 0), (b, 0, 1)
    while new[0]:
        q = old[0] // new[0]
        step = (old[0] - q * new[0], old[1] - q * new[1], old[2] - q * new[2])
        lines.append(f"| {step[0]} | {q} | {step[1]} | {step[2]} |")
        old, new = new, step
    g, x, y = old
    lines += [
        "",
        f"The last nonzero remainder is {g}. Indeed {a}·({x}) + {b}·({y}) = {a * x} "
        f"{signed(b * y)} = {g}. The least common multiple follows as "
        f"{a}·{b}/{g} = {a * b // g}.",
    ]
    return "\n".join(lines)


def linear_equation(dice: Dice, world: World) -> str:
    """Solve an equation with brackets for one unknown."""
    x = dice.between(2, 9) * dice.pick((1, -1))
    a, b = world.factor(dice), dice.between(2, 11)
    c = dice.pick([n for n in range(2, 12) if n != a])
    d = a * (x + b) - c * x
    lines = [
        dice.pick(("Solve for x:", "Determine x.", "Find the number x for which")),
        "",
        f"    {a}(x + {b}) = {c}x {signed(d)}",
        "",
        f"Expand the left side: {a}x + {a * b} = {c}x {signed(d)}.",
        f"Subtract {c}x from both sides: {signed(a - c, 'x', True)} + {a * b} = {d}.",
        f"Subtract {a * b}: {signed(a - c, 'x', True)} = {d - a * b}.",
    ]
    if a - c != 1:
        lines.append(f"Divide by {a - c}: x = {x}.")
    lines += [
        "",
        f"Test: the left side is {a}·({x} + {b}) = {a}·{x + b} = {a * (x + b)}; "
        f"the right side is {c}·({x}) {signed(d)} = {c * x + d}.",
    ]
    return "\n".join(lines)


def quadratic(dice: Dice, world: World) -> str:
    """Solve a quadratic equation by completing the square, in LaTeX."""
    half = world.factor(dice)
    radius = dice.pick([n for n in range(1, 16) if n != half])
    b, c = -2 * half, half * half - radius * radius
    opening = dice.pick(
        (
            f"Solve $x^2 {signed(b, 'x')} {signed(c)} = 0$ by completing the square.",
            f"**Exercise.** Find the roots of $x^2 {signed(b, 'x')} {signed(c)}$.",
        )
    )
    low, high = half - radius, half + radius
    return "\n".join(
        [
            opening,
            "",
            "\\begin{align*}",
            f"x^2 {signed(b, 'x')} &= {-c} \\\\",
            f"x^2 {signed(b, 'x')} + {half}^2 &= {-c} + {half * half} \\\\",
            f"(x - {half})^2 &= {radius * radius} \\\\",
            f"x - {half} &= \\pm {radius}",
            "\\end{align*}",
            "",
            f"Hence $x_1 = {half} - {radius} = {low}$ and "
            f"$x_2 = {half} + {radius} = {high}$. By Vieta, the sum of the roots is "
            f"${low + high} = -({b})$ and their product is ${low * high}$, "
            "the constant term. The vertex of the parabola lies at "
            f"$({half}, {-radius * radius})$.",
        ]
    )


def two_equations(dice: Dice, world: World) -> str:
    """Solve two linear equations by elimination."""
    x, y = dice.between(-6, 9), dice.between(-6, 9)
    a, b = dice.between(2, 7), world.factor(dice)
    c, d = world.factor(dice) + 1, dice.between(2, 9)
    while a * d == b * c:
        d += 1
    e, f = a * x + b * y, c * x + d * y
    det = a * d - b * c
    return "\n".join(
        [
            "Solve the system",
            "",
            f"    (1)  {a}x + {b}y = {e}",
            f"    (2)  {c}x + {d}y = {f}",
            "",
            f"To remove x, multiply (1) by {c} and (2) by {a}:",
            "",
            f"    {a * c}x + {b * c}y = {e * c}",
            f"    {a * c}x + {a * d}y = {f * a}",
            "",
            f"The difference, second minus first, is {det}y = {f * a - e * c}, "
            f"so y = {y}. Put this in (1): {a}x {signed(b * y)} = {e}, that is "
            f"{a}x = {e - b * y} and x = {x}.",
            f"The pair (x, y) = ({x}, {y}) also fits (2): {c * x} {signed(d * y)} = {f}.",
        ]
    )


def tangent(dice: Dice, world: World) -> str:
    """Differentiate a cubic and find a tangent line."""
    f = [dice.between(1, 4), -world.factor(dice), dice.between(-9, 9)]
    f.append(world.factor(dice))
    slope = [3 * f[0], 2 * f[1], f[2]]
    p = dice.pick((-3, -2, -1, 1, 2, 3, 4))
    m, height = value_at(slope, p), value_at(f, p)
    inflection = Fraction(-f[1], 3 * f[0])
    return "\n".join(
        [
            f"Let $f(x) = {polynomial(f)}$. We want the tangent at $x = {p}$.",
            "",
            "Differentiate term by term with the power rule:",
            "",
            f"$$f'(x) = {polynomial(slope)}.$$",
            "",
            f"At the given point $f({p}) = {height}$ and $f'({p}) = {m}$. The tangent is therefore",
            "",
            f"$$y = {m}(x {signed(-p)}) {signed(height)} = {polynomial([m, height - m * p])}.$$",
            "",
            f"The second derivative $f''(x) = {polynomial([6 * f[0], 2 * f[1]])}$ "
            f"vanishes at $x = {latex(inflection)}$, where the graph changes from "
            "bending downwards to bending upwards.",
        ]
    )


def integral(dice: Dice, world: World) -> str:
    """Evaluate the definite integral of a quadratic."""
    a, b, c = dice.between(1, 8), world.factor(dice), dice.between(-7, 7)
    low = dice.between(-2, 1)
    high = low + dice.between(1, 4)

    def primitive(x: int) -> Fraction:
        return Fraction(a * x**3, 3) + Fraction(b * x**2, 2) + c * x

    top, bottom = primitive(high), primitive(low)
    cube = "" if a == 3 else latex(Fraction(a, 3))
    linear = f" {signed(c, 'x')}" if c else ""
    mean = float((top - bottom) / (high - low))
    return "\n".join(
        [
            f"Compute $\\int_{{{low}}}^{{{high}}} ({polynomial([a, b, c])})\\,dx$.",
            "",
            f"An antiderivative is $F(x) = {cube}x^3 + {latex(Fraction(b, 2))}x^2{linear}$.",
            "",
            "\\[",
            f"F({high}) = {latex(top)}, \\qquad F({low}) = {latex(bottom)}, \\qquad "
            f"F({high}) - F({low}) = {latex(top - bottom)}.",
            "\\]",
            "",
            "By the fundamental theorem of calculus the integral equals "
            f"${latex(top - bottom)}$, that is {float(top - bottom):.3f} to three "
            "decimals, and the mean value of the integrand over the interval of length "
            f"{high - low} is about {mean:.3f}.",
        ]
    )


def factorise(number: int) -> list[tuple[int, int]]:
    """Return the prime factors of a number with their exponents."""
    out = []
    prime = 2
    while prime * prime <= number:
        power = 0
        while number % prime == 0:
            number //= prime
            power += 1
        if power:
            out.append((prime, power))
        prime += 1
    if number > 1:
        out.append((number, 1))
    return out


def prime_factors(dice: Dice, world: World) -> str:
    """Factorise a number and count and add its divisors."""
    number = world.number(dice) * dice.pick((4, 6, 12, 20))
    factors = factorise(number)
    written = " · ".join(f"{p}^{k}" if k > 1 else str(p) for p, k in factors)
    lines = [f"Prime factorisation of {number}", ""]
    rest = number
    for prime, power in factors:
        for _ in range(power):
            lines.append(f"{rest} / {prime} = {rest // prime}")
            rest //= prime
    count, total, totient = 1, 1, number
    for prime, power in factors:
        count *= power + 1
        total *= (prime ** (power + 1) - 1) // (prime - 1)
        totient = totient // prime * (prime - 1)
    product = "".join(f"({k}+1)" for _, k in factors)
    lines += [
        "",
        f"So {number} = {written}.",
        f"Number of divisors: {product} = {count}. Sum of the divisors: {total}.",
        f"Euler's totient: {totient} of the residues below {number} are coprime to it.",
        f"Since trial division need only go up to the square root, no prime above "
        f"{isqrt(number)} had to be tried as a smaller factor.",
    ]
    return "\n".join(lines)


def modular_power(dice: Dice, world: World) -> str:
    """Compute a modular power by repeated squaring."""
    base, modulus = world.factor(dice), world.number(dice)
    exponent = dice.between(40, 250)
    lines = [
        dice.pick(
            (
                f"Compute {base}^{exponent} mod {modulus} by repeated squaring.",
                f"Which remainder does {base}^{exponent} leave modulo {modulus}?",
            )
        ),
        "",
        f"In binary, {exponent} = {exponent:b}.",
        "",
    ]
    square, result, used = base % modulus, 1, []
    for place in range(exponent.bit_length()):
        power = 1 << place
        if exponent & power:
            result = result * square % modulus
            used.append(power)
            lines.append(f"{base}^{power} ≡ {square}   (used, product ≡ {result})")
        else:
            lines.append(f"{base}^{power} ≡ {square}")
        square = square * square % modulus
    lines += [
        "",
        f"As {exponent} = {' + '.join(map(str, used))}, the remainder is {result}.",
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


def progression(dice: Dice, world: World) -> str:
    """Sum an arithmetic and a geometric progression."""
    first, step, count = dice.between(2, 60), world.factor(dice), dice.between(12, 60)
    last = first + (count - 1) * step
    ratio, terms, lead = dice.between(2, 4), dice.between(5, 8), world.factor(dice)
    powers = [lead * ratio**k for k in range(terms)]
    total = lead * (ratio**terms - 1) // (ratio - 1)
    return "\n".join(
        [
            f"(a) The sequence {first}, {first + step}, {first + 2 * step}, … has "
            f"{count} terms. Its last term is {first} + {count - 1}·{step} = {last}. "
            f"Pair the first with the last, the second with the last but one: each "
            f"pair makes {first + last}, and so the sum is "
            f"{count}·{first + last}/2 = {count * (first + last) // 2}.",
            "",
            f"(b) Multiply by {ratio} each time, starting from {lead}: "
            f"{', '.join(map(str, powers))}. Write S for the sum. Then "
            f"{ratio}S - S = {powers[-1] * ratio} - {lead}, so "
            f"S = {powers[-1] * ratio - lead}/{ratio - 1} = {total}.",
            "",
            f"Ratio of the two sums: {count * (first + last) / 2 / total:.3f}.",
        ]
    )


def matrices(dice: Dice, world: World) -> str:
    """Multiply two 2 by 2 matrices and invert the first."""
    a, b, c = (dice.between(-5, 6) for _ in range(3))
    d = world.factor(dice)
    if a * d == b * c:
        a += 1 + (d == 0)
    e, f, g, h = (dice.between(-6, 7) for _ in range(4))
    p, q, r, s = a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h
    det = a * d - b * c

    def matrix(w: object, x: object, y: object, z: object) -> str:
        return f"\\begin{{pmatrix}} {w} & {x} \\\\ {y} & {z} \\end{{pmatrix}}"

    if det == 0:
        verdict = "The determinant of $A$ is zero, so $A$ has no inverse."
    else:
        inverse = matrix(*(latex(Fraction(n, det)) for n in (d, -b, -c, a)))
        verdict = f"Since $\\det A = {det}$, we get $A^{{-1}} = {inverse}$."
    return "\n".join(
        [
            f"Let $A = {matrix(a, b, c, d)}$ and $B = {matrix(e, f, g, h)}$.",
            "",
            f"$$AB = {matrix(p, q, r, s)}$$",
            "",
            f"The top left entry is row one of $A$ times column one of $B$: "
            f"$({a})({e}) + ({b})({g}) = {p}$. {verdict} As a check, "
            f"$\\det(AB) = {p * s - q * r}$ equals $\\det A \\cdot \\det B = "
            f"{det} \\cdot {e * h - f * g}$.",
        ]
    )


def bases(dice: Dice, world: World) -> str:
    """Convert a number to binary and hexadecimal by division."""
    number = world.number(dice) * 10 + dice.between(0, 9)
    base = dice.pick((3, 5, 7, 16) if world.name == "calibration" else (6, 8, 9))
    lines = [f"Write the decimal number {number} in base {base}.", ""]
    digits, rest = [], number
    while rest:
        rest, digit = divmod(rest, base)
        digits.append("0123456789ABCDEF"[digit])
        lines.append(f"quotient {rest}, remainder {digits[-1]}")
    text = "".join(reversed(digits))
    weights = " + ".join(f"{int(d, 16)}·{base**k}" for k, d in reversed(list(enumerate(digits))))
    lines += [
        "",
        f"Read upwards: {text} (base {base}). Converting back, {weights} = {number}. "
        f"In binary the same number is {number:b}, which has "
        f"{bin(number).count('1')} ones.",
    ]
    return "\n".join(lines)


def binomials(dice: Dice, world: World) -> str:
    """Answer counting questions about a committee."""
    women, men = dice.between(5, 9), dice.between(4, 8)
    size = dice.between(3, 4)
    n = women + men
    total, none = comb(n, size), comb(men, size)
    two = comb(women, 2) * comb(men, size - 2)
    club = dice.pick(("chess club", "choir", "rowing team", "book circle"))
    place = dice.pick(world.places)
    return "\n".join(
        [
            f"The {club} of {place} has {women} women and {men} men. A committee of {size} is chosen by lot.",
            "",
            f"1. There are C({n},{size}) = {total} possible committees.",
            f"2. No woman is in C({men},{size}) = {none} of them, so the chance that "
            f"at least one woman is chosen is 1 - {none}/{total} = "
            f"{1 - Fraction(none, total)}.",
            f"3. Exactly two women: C({women},2) · C({men},{size - 2}) = "
            f"{comb(women, 2)} · {comb(men, size - 2)} = {two}, a probability of "
            f"{two / total:.4f}.",
            f"4. If a chair is named as well, the count becomes {size} · {total} = "
            f"{size * total}, for each committee can be led by any of its members.",
        ]
    )


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


RECIPES = (
    Recipe("math", long_multiplication, 2, 1),
    Recipe("math", long_division, 2, 1),
    Recipe("math", euclid, 2, 1),
    Recipe("math", linear_equation, 2, 1),
    Recipe("math", quadratic, 2, 1),
    Recipe("math", two_equations, 2, 1),
    Recipe("math", tangent, 2, 1),
    Recipe("math", integral, 2, 1),
    Recipe("math", prime_factors, 2, 1),
    Recipe("math", modular_power, 2, 1),
    Recipe("math", compound_interest, 2, 0),
    Recipe("math", fractions, 2, 0),
    Recipe("math", progression, 2, 1),
    Recipe("math", matrices, 2, 0),
    Recipe("math", bases, 2, 0),
    Recipe("math", binomials, 2, 0),
    Recipe("math", conversions, 2, 0),
    Recipe("math", chinese_problem, 2, 1),
)
