"""Counts as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.units import format_count, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.25T", 1_250_000_000_000), ("500K", 500_000), ("5_000_000", 5_000_000), (7, 7), (5e6, 5_000_000),
        ("0", 0), ("1e3", 1000), (" 2 M ", 2_000_000), ("0.001K", 1), ("1.1B", 1_100_000_000),
    ],
)  # fmt: skip
def test_parse(text: int | float | str, count: int) -> None:
    assert parse_count(text) == count


NONSENSE = [
    "",
    "K",
    "1.5",
    "1Q",
    "10m",
    "-3",
    -3,
    1.5,
    True,
    None,
    "1e-3",
    "nan",
    float("inf"),
    "1 2",
    "9e30",
]


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_refuse(nonsense: object) -> None:
    with pytest.raises(DataError):
        parse_count(nonsense)  # type: ignore[arg-type]


def test_lower_case_unit_says_what_to_write() -> None:
    with pytest.raises(DataError, match="write M"):
        parse_count("10m")


@given(st.integers(0, 10**15))
def test_format_is_close_and_parses_back(count: int) -> None:
    assert abs(parse_count(format_count(count)) - count) <= max(count, 1) * 1e-3


def test_format() -> None:
    assert [format_count(n) for n in (999, 1000, 1_250_000_000_000, 999_999_999, 0)] == [
        "999",
        "1K",
        "1.25T",
        "1B",
        "0",
    ]
