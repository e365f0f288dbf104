"""Days and months in words."""

from __future__ import annotations

from datetime import date

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


def long_date(day: date) -> str:
    """Write a date such as 4 March 2021."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"
