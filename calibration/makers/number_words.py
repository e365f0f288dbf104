"""Whole numbers in English words, as Roman numerals and in Chinese characters."""

from __future__ import annotations

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
