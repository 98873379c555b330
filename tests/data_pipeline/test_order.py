"""The order of windows within an epoch: a bijection for any number of windows, different each epoch, local in
its reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import order

seeds = st.integers(0, 2**63)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), seeds, st.integers(0, 1000), st.sampled_from([16, 512, 4096, 2**20]))
def test_bijection_for_any_length_and_seed(count: int, seed: int, epoch: int, sequence_length: int) -> None:
    key = order.source_key(seed, "web")
    windows = order.windows(key, epoch, np.arange(count), count, sequence_length)
    assert np.array_equal(np.sort(windows), np.arange(count))


def test_bijection_over_many_groups_and_a_partial_chunk() -> None:
    count = 64 * 64 * 3 + 1000 + 7
    windows = order.windows(order.source_key(1, "a"), 3, np.arange(count), count, 4096)
    assert np.array_equal(np.sort(windows), np.arange(count))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), seeds)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    x = np.arange(size, dtype=np.uint64)
    y = order.permute(x, np.full(size, size, np.uint64), np.full(size, key, np.uint64))
    assert np.array_equal(np.sort(y), x)


def test_epochs_seeds_and_sources_differ() -> None:
    count = 1000
    orders = [
        order.windows(order.source_key(seed, name), epoch, np.arange(count), count, 128)
        for seed, name, epoch in [(1, "a", 0), (1, "a", 1), (2, "a", 0), (1, "b", 0)]
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.02  # by chance 1 in 1000


def test_asking_for_one_or_many_or_mixed_sources_is_the_same() -> None:
    keys = np.array([order.source_key(0, name) for name in "abc"], np.uint64)
    counts = np.array([17, 5000, 300])
    source = np.arange(60) % 3
    position, epoch = np.arange(60) % 17, np.arange(60) // 17
    together = order.windows(keys[source], epoch, position, counts[source], 512)
    alone = [
        int(order.windows(int(keys[s]), int(e), np.array([p]), int(counts[s]), 512)[0])
        for s, e, p in zip(source, epoch, position, strict=True)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("count", [7, 100, 4096, 100_000])
def test_it_looks_random(count: int) -> None:
    """Over keys, the window at a position is uniform over tenths, and neighbours in the order are not
    neighbours on disk."""
    keys = np.array([order.source_key(seed, "a") for seed in range(2000)], np.uint64)
    for position in (0, count // 2, count - 1):
        windows = order.windows(keys, 0, np.full(2000, position), count, 4096)
        bins = np.bincount((windows * 7 // count), minlength=7)
        share = np.bincount(np.arange(count) * 7 // count, minlength=7) / count
        chi_square = ((bins - 2000 * share) ** 2 / (2000 * share)).sum()
        assert chi_square < 32  # 6 degrees of freedom: beyond it by chance once in 60,000
    if count >= 4096:
        windows = order.windows(int(keys[0]), 0, np.arange(count), count, 4096)
        assert np.mean(np.abs(np.diff(windows)) <= 1) < 0.01
        correlation = np.corrcoef(windows[:-1], windows[1:])[0, 1]
        assert abs(correlation) < 0.1


def test_reads_are_local() -> None:
    """A group of 4096 windows touches 64 chunks of 64 windows and no more, wherever it lies in the epoch."""
    count, sequence_length = 1_000_000, 4096
    key = order.source_key(5, "web")
    for group in (0, 17, 200):
        windows = order.windows(key, 0, np.arange(group * 4096, (group + 1) * 4096), count, sequence_length)
        assert len(np.unique(windows // 64)) <= 65
        assert windows.max() - windows.min() > count // 2


def test_shifts_are_uniform_enough_and_differ_by_epoch() -> None:
    drawn = order.shifts(order.source_key(0, "a"), np.arange(1000), 64)
    assert drawn.min() == 0 and drawn.max() == 63 and len(np.unique(drawn)) == 64


def test_the_order_is_frozen() -> None:
    """These values may never change under order version 1: runs exist that were fed in this order."""
    key = order.source_key(1234, "web")
    assert order.ORDER_VERSION == 1
    assert key == 993250069880465531
    assert order.shifts(key, np.arange(4), 4096).tolist() == [4081, 165, 2827, 2267]
    assert order.windows(key, 2, np.arange(6), 10, 4096).tolist() == [6, 2, 3, 0, 9, 7]
    assert order.windows(key, 0, np.arange(6) * 10**6, 244_140_624, 4096).tolist() == [
        93327370,
        125976490,
        128435432,
        167983066,
        170470653,
        56915947,
    ]
