"""A flat range as rectangles: every element once, in order, and few of them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_train.checkpoint.coverage import what_is_not_tiled
from moe_train.checkpoint.rectangles import rectangles

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw) -> tuple[tuple[int, ...], int, int]:
    shape = draw(SHAPES)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, start, stop


@given(ranges())
def test_they_are_the_range_in_order(case) -> None:
    shape, start, stop = case
    flat = np.arange(math.prod(shape)).reshape(shape)
    parts = [
        flat[tuple(slice(first, first + length) for first, length in zip(offset, extent))].ravel()
        for offset, extent in rectangles(shape, start, stop)
    ]
    assert np.concatenate([*parts, np.empty(0, int)]).tolist() == list(range(start, stop))


@given(ranges())
def test_there_are_few_and_none_is_empty(case) -> None:
    shape, start, stop = case
    found = list(rectangles(shape, start, stop))
    assert len(found) <= 2 * len(shape) - 1
    assert all(len(offset) == len(extent) == len(shape) and min(extent) > 0 for offset, extent in found)


@given(SHAPES, st.data())
def test_any_cuts_of_a_tensor_tile_it(shape, data) -> None:
    """What the ranks of any layout write: their ranges meet, so their rectangles cover each element once."""
    size = math.prod(shape)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, size), max_size=6))), size]
    found = [each for begin, end in zip(cuts, cuts[1:]) for each in rectangles(shape, begin, end)]
    assert what_is_not_tiled(shape, found) is None
    lost = data.draw(st.integers(0, len(found) - 1))
    assert "not covered" in what_is_not_tiled(shape, found[:lost] + found[lost + 1 :])
    assert "overlaps" in what_is_not_tiled(shape, [*found, found[lost]])
    assert "sticks out" in what_is_not_tiled(shape, [*found, ((0,) * len(shape), tuple(n + 1 for n in shape))])
