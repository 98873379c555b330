"""Computations that take turns, on one rank; that rows travel meanwhile, tests/integration/test_layouts.py shows."""

from __future__ import annotations

import pytest

from parallel.turns import finish, in_turn, without_waiting


def counting(name: str, waits: int, said: list[str]):
    for number in range(waits):
        said.append(f"{name}{number}")
        yield
    said.append(f"{name} ends")
    return name


def test_each_goes_on_where_it_waited() -> None:
    said: list[str] = []
    assert in_turn([counting("a", 2, said), counting("b", 1, said), counting("c", 0, said)]) == ["a", "b", "c"]
    assert said == ["a0", "b0", "c ends", "a1", "b ends", "a ends"]


def test_one_alone_runs_to_its_end() -> None:
    said: list[str] = []
    assert finish(counting("a", 3, said)) == "a"
    assert finish(without_waiting(divmod)(7, 2)) == (3, 1)


def test_an_error_is_the_caller_s() -> None:
    with pytest.raises(ZeroDivisionError):
        in_turn([counting("a", 2, []), without_waiting(divmod)(1, 0)])
