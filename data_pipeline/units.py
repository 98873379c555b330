"""Counts as people write them: ``1.25T``, ``500K``, ``5_000_000``. K, M, B and T are powers of 1000."""

from __future__ import annotations

import re
from fractions import Fraction

from data_pipeline.errors import DataError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE]\+?([0-9]{1,2}))?\s*([A-Za-z]*)")
_LARGEST = 10**18  # beyond it int64 positions in a stream overflow


def parse_count(value: int | float | str) -> int:
    """The whole number that `value` stands for, exactly (no float arithmetic on strings).

    >>> parse_count("1.25T"), parse_count("500K"), parse_count(12)
    (1250000000000, 500000, 12)

    Raises DataError for anything that is not a whole number from 0 to 1e18.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise DataError(f"{value!r} is not a count; write a whole number such as 5000000, 500K or 1.25T")
    if isinstance(value, str):
        count = _parse_text(value)
    else:
        if value != value or value in (float("inf"), float("-inf")):
            raise DataError(f"{value!r} is not a count; write a whole number such as 5000000, 500K or 1.25T")
        count = Fraction(value)
    if count.denominator != 1:
        raise DataError(f"{value!r} is not a whole number; write a count such as 5000000, 500K or 1.25T")
    if not 0 <= count <= _LARGEST:
        raise DataError(f"{value!r} is out of range; a count lies between 0 and 1000000T")
    return int(count)


def _parse_text(text: str) -> Fraction:
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise DataError(f"{text!r} is not a count; write a whole number such as 5000000, 500K or 1.25T")
    number, exponent, unit = match.groups()
    if unit not in UNITS:
        hint = f"write {unit.upper()}" if unit.upper() in UNITS else "the units are K, M, B and T (powers of 1000)"
        raise DataError(f"{text!r} has the unknown unit {unit!r}; {hint}")
    return Fraction(number.replace("_", "")) * 10 ** int(exponent or 0) * UNITS[unit]


def format_count(count: int | float, digits: int = 3) -> str:
    """`count` for people, with at most `digits` decimals: 1250000000000 -> ``1.25T``, 999 -> ``999``."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    for unit in ("T", "B", "M", "K"):
        if round(size / UNITS[unit], digits) >= 1:
            return f"{sign}{_trim(size / UNITS[unit], digits)}{unit}"
    return f"{sign}{_trim(size, digits)}"


def _trim(number: float, digits: int) -> str:
    text = f"{number:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
