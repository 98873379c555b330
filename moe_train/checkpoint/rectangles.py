"""A flat range of a tensor as rectangles: how a sharded optimizer's state becomes pieces of a global
tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements ``start .. stop`` of a row-major tensor as (offset, extent) pairs, in order.

    At most ``2 * len(shape) - 1`` of them: the end of a row, whole rows, the beginning of a row, in each
    dimension."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _inside(shape, last, start, stop)
        return
    yield from _inside(shape, first - 1, start, first * row)
    if last > first:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _inside(shape, last, last * row, stop)


def _inside(shape: tuple[int, ...], index: int, start: int, stop: int):
    """The rectangles of a range that lies within row ``index``."""
    base = index * math.prod(shape[1:])
    for offset, extent in rectangles(shape[1:], start - base, stop - base):
        yield (index, *offset), (1, *extent)
