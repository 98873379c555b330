"""Durations of a run (tokens or steps) and times on the clock, as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer

from data_pipeline.units import UNITS, parse_count
from data_pipeline.yaml_marks import as_yaml

_STEPS = re.compile(r"(.*\S)\s*\bsteps?", re.DOTALL)
_TIME_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)\s*")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_SECONDS = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1}


@dataclass(frozen=True)
class Duration:
    """A length of training: either `tokens` or `steps` is set, the other is None.

    >>> Duration(tokens=500_000), Duration(steps=100)
    (Duration(tokens=500000, steps=None), Duration(tokens=None, steps=100))
    """

    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("a duration is a number of tokens or a number of steps: give one of the two")
        if self.amount < 0:
            raise ValueError(f"a duration is not negative: {self.amount}")

    @property
    def amount(self) -> int:
        """The number that is set, of whichever unit."""
        return self.steps if self.tokens is None else self.tokens  # type: ignore[return-value]

    def in_tokens(self, tokens_per_step: int) -> int:
        """The duration in tokens, where a step (one global batch) is `tokens_per_step`."""
        return self.steps * tokens_per_step if self.tokens is None else self.tokens  # type: ignore[operator]

    def __str__(self) -> str:
        """The shortest exact text, which `parse_duration` reads back."""
        if self.tokens is None:
            return f"{self.steps} steps"
        for letter in "TBMK":
            if self.tokens and self.tokens % UNITS[letter] == 0:
                return f"{self.tokens // UNITS[letter]}{letter}"
        return str(self.tokens)


def parse_duration(value: Any) -> Duration:
    """``100K`` or ``5000000`` (tokens), ``100 steps``. Raises ValueError for anything else."""
    if isinstance(value, Duration):
        return value
    advice = "write tokens (5000000, 500K, 1.25T) or steps ('100 steps')"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{as_yaml(value)} is not a duration; {advice}")
    steps = _STEPS.fullmatch(value) if isinstance(value, str) else None
    try:
        return Duration(steps=parse_count(steps.group(1))) if steps else Duration(tokens=parse_count(value))
    except ValueError:
        raise ValueError(f"{as_yaml(value)} is not a duration; {advice}") from None


def parse_time(value: Any) -> float:
    """Seconds of ``30s``, ``10m``, ``1h``, ``1h30m``, ``2d``, ``1:30:00`` or Slurm's ``2-00:00:00``. Raises
    ValueError else.

    A bare number is refused: nobody can tell whether it means seconds or minutes (Slurm reads minutes).
    """
    advice = "write a number with its unit, such as 30s, 10m, 1h or 1h30m"
    if isinstance(value, bool) or not isinstance(value, str):
        raise ValueError(f"{as_yaml(value)} is not a time; {advice}")
    clock = _CLOCK.fullmatch(value.strip())
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return float(days * 86400 + hours * 3600 + minutes * 60 + seconds)
    text = value.strip()
    parts = _TIME_PART.findall(text)
    if not parts or _TIME_PART.sub("", text):
        raise ValueError(f"{as_yaml(value)} is not a time; {advice}")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def format_time(seconds: float) -> str:
    """``5400`` -> ``1h30m``; `parse_time` reads it back exactly."""
    if seconds != int(seconds):
        return f"{seconds!r}s"
    text, rest = "", int(seconds)
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, _SECONDS[unit])
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def _positive(value: Duration) -> Duration:
    if value.amount <= 0:
        raise ValueError("must be more than 0")
    return value


def _positive_time(value: float) -> float:
    if value <= 0:
        raise ValueError("must be more than 0s")
    return value


def _seconds(value: Any) -> float:
    """Python code may give seconds as a float (what a loaded config holds); files give text."""
    return value if isinstance(value, float) else parse_time(value)


DurationField = Annotated[InstanceOf[Duration], BeforeValidator(parse_duration), PlainSerializer(str)]
"""A duration that may be 0 (a warm-up, a decay)."""

Interval = Annotated[DurationField, Field(), BeforeValidator(lambda value: _positive(parse_duration(value)))]
"""A duration that must be more than 0 (every so often)."""

Seconds = Annotated[float, BeforeValidator(lambda value: _positive_time(_seconds(value))), PlainSerializer(format_time)]
"""A time on the clock, in seconds once read."""

Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that may be written with K, M, B or T."""
