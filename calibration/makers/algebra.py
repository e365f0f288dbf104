"""Worked algebra and calculus: equations, polynomials, matrices."""

from __future__ import annotations

from fractions import Fraction
from math import comb

from .common import Dice, World


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
