"""Number theory, worked out: divisors, prime factors, powers modulo a number, other bases."""

from __future__ import annotations

from math import isqrt

from .algebra import signed
from .common import Dice, World


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
