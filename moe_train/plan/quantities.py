"""Numbers as a planner's options take them: 5.76e23, 8B, 1.25T; and as its tables show them."""

from __future__ import annotations

import math

from data_pipeline.units import UNITS
from moe_train.errors import UserError


def number(text: str | float | int, name: str) -> float:
    """A number, with an optional K, M, B or T. Raises UserError, one line that names the option."""
    written = str(text).strip()
    unit = written[-1:].upper() if written[-1:].upper() in UNITS and written[-1:].isalpha() else ""
    try:
        return float(written[: len(written) - len(unit)].replace("_", "")) * UNITS[unit]
    except ValueError:
        raise UserError(f"{name} {written!r} is not a number; write for example 5.76e23, 8B or 1.25T") from None


def positive(text: str | float | int, name: str) -> float:
    """A `number` that is finite and more than 0."""
    value = number(text, name)
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{name} must be more than 0, not {str(text).strip()}")
    return value


def part(value: float, name: str) -> float:
    """A number over 0 and at most 1, such as a utilisation."""
    if not 0 < value <= 1:
        raise UserError(f"{name} must be more than 0 and at most 1, not {value:g}")
    return value


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table as plain text, the first column to the left and the others to the right."""
    from rich.table import Table

    from data_pipeline.report import as_text

    result = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return as_text([result])


def gib(size: float) -> str:
    """Bytes as GiB, or MiB and KiB where they are few."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"
