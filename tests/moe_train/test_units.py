"""Durations and times as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.units import Duration, format_time, parse_duration, parse_time


@pytest.mark.parametrize(
    ("text", "tokens", "steps"),
    [
        ("100K", 100_000, None),
        ("1.25T", 1_250_000_000_000, None),
        (5_000_000, 5_000_000, None),
        (5e6, 5_000_000, None),
    ]
    + [("100 steps", None, 100), ("1 step", None, 1), ("2K steps", None, 2000), (0, 0, None)],
)
def test_durations(text: object, tokens: int | None, steps: int | None) -> None:
    assert parse_duration(text) == Duration(tokens=tokens, steps=steps)


@pytest.mark.parametrize("text", ["", "steps", "ten steps", "100 stepps", "-5", -5, 1.5, True, None, [], "10m", "5 k"])
def test_not_durations(text: object) -> None:
    with pytest.raises(ValueError, match="is not a duration; write tokens"):
        parse_duration(text)


def test_a_duration_is_one_of_the_two() -> None:
    for wrong in ({}, {"tokens": 1, "steps": 1}):
        with pytest.raises(ValueError, match="one of the two"):
            Duration(**wrong)
    assert Duration(steps=3).in_tokens(4096) == 12288 and Duration(tokens=7).in_tokens(4096) == 7


@given(st.integers(0, 10**15), st.booleans())
def test_a_duration_survives_its_text(amount: int, steps: bool) -> None:
    duration = Duration(steps=amount) if steps else Duration(tokens=amount)
    assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("10m", 600),
        ("10 min", 600),
        ("1h", 3600),
        ("1h30m", 5400),
        ("2d", 172800),
        ("1.5h", 5400),
    ]
    + [("1:30:00", 5400), ("2-00:00:10", 172810)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "10", 10, "1:30", "5 weeks", "m", "-1s", "10m later", None, True])
def test_not_times(text: object) -> None:
    with pytest.raises(ValueError, match="is not a time; write a number with its unit"):
        parse_time(text)


@given(st.one_of(st.integers(0, 10**7), st.sampled_from([0.5, 0.25, 90.125])))
def test_a_time_survives_its_text(seconds: float) -> None:
    assert parse_time(format_time(seconds)) == seconds
