"""Computations that take turns: while one waits for rows that travel between ranks, another computes.

Such a computation is a generator. It yields where it would wait, and returns its result. The backward pass takes the
same turns from the last to the first, since autograd runs operations in the reverse of the order in which they were
called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Steps = Generator[None, None, Result]


def in_turn(computations: Sequence[Steps[Result]]) -> list[Result]:
    """Run all of them, each in its turn up to where it next waits; what they return."""
    results: dict[int, Result] = {}
    while len(results) < len(computations):
        for number, steps in enumerate(computations):
            if number in results:
                continue
            try:
                next(steps)
            except StopIteration as end:
                results[number] = end.value
    return [results[number] for number in range(len(computations))]


def finish(steps: Steps[Result]) -> Result:
    """Run one alone: where it yields it waits."""
    return in_turn([steps])[0]


def without_waiting(function: Callable[Arguments, Result]) -> Callable[Arguments, Steps[Result]]:
    """Make a computation that never yields out of a function, for where others of its kind do."""

    @functools.wraps(function)
    def steps(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Steps[Result]:
        return function(*args, **kwargs)
        yield

    return steps
