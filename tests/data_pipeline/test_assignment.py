"""Which source feeds sample n: counts within the proven bound, closed form equal to itself however it is
asked."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.assignment import Assignment, exact_weight, integer_weights

weights = st.lists(st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1e6)), min_size=1, max_size=40)


def named(values: list) -> dict[str, float]:
    return {f"s{i:03d}": value for i, value in enumerate(values)}


def due(assignment: Assignment, given_weights: dict, samples: int) -> dict[str, Fraction]:
    total = sum(exact_weight(weight) for weight in given_weights.values())
    return {name: samples * exact_weight(given_weights[name]) / total for name in assignment.names}


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 2**45))
def test_counts_stay_within_the_bound(values: list, samples: int) -> None:
    assignment = Assignment(named(values))
    counts, right = assignment.counts(samples), due(assignment, named(values), samples)
    assert sum(counts.values()) == samples
    assert max(abs(counts[name] - right[name]) for name in counts) < 2


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 2**49))
def test_every_prefix_follows_from_locate(values: list, start: int) -> None:
    """Ranks count up by one for each source, and agree with `counts` and with Python's integers."""
    assignment = Assignment(named(values))
    samples = np.arange(start, start + 64)
    sources, ranks = assignment.locate(samples)
    seen = assignment.counts(start)
    for sample, source, rank in zip(samples.tolist(), sources.tolist(), ranks.tolist(), strict=True):
        name = assignment.names[source]
        assert rank == seen[name]
        assert assignment.locate_one(sample) == (source, rank)
        seen[name] += 1
    assert seen == assignment.counts(start + 64)


@pytest.mark.parametrize("heavy", [1.0, 1e6, 1e9])
def test_500_sources_one_heavy_every_prefix(heavy: float) -> None:
    random = np.random.default_rng(0)
    values = named([heavy, *random.lognormal(0, 2, 499).tolist()])
    assignment = Assignment(values)
    samples = 20_000
    sources, _ = assignment.locate(np.arange(samples))
    total = sum(values.values())
    for index, name in enumerate(assignment.names):
        counts = np.cumsum(sources == index)
        worst = np.abs(counts - np.arange(1, samples + 1) * (values[name] / total)).max()
        assert worst < 2, (name, worst)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 9), st.integers(0, 499), st.integers(0, 2**45))
def test_500_sources_one_heavy_anywhere(seed: int, heavy: float, which: int, samples: int) -> None:
    values = np.random.default_rng(seed).lognormal(0, 2, 500).tolist()
    values[which] *= 10**heavy
    assignment = Assignment(named(values))
    counts, right = assignment.counts(samples), due(assignment, named(values), samples)
    assert sum(counts.values()) == samples
    assert max(abs(counts[name] - right[name]) for name in counts) < 2
    assert assignment.locate(np.array([samples]))[0][0] == assignment.locate_one(samples)[0]


def test_fibonacci_weights_the_deepest_tree() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 80:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    values = named(fibonacci)
    assignment = Assignment(values)
    for samples in (1, 7, 1000, 12345678, 3 * 10**8, 2**49):
        counts, right = assignment.counts(samples), due(assignment, values, samples)
        assert max(abs(counts[name] - right[name]) for name in counts) < 1.69
        assert assignment.locate(np.array([samples]))[0][0] == assignment.locate_one(samples)[0]


def test_vectors_agree_with_exact_integers_where_floats_do_not() -> None:
    random = np.random.default_rng(3)
    assignment = Assignment(named(random.lognormal(0, 2, 30).tolist()))
    assert assignment.total > 2**55
    samples = 2**50 - 2 - random.integers(0, 2**40, 2000)
    sources, ranks = assignment.locate(samples)
    exact = [assignment.locate_one(n) for n in samples.tolist()]
    assert list(zip(sources.tolist(), ranks.tolist(), strict=True)) == exact


def test_weights_are_taken_as_written() -> None:
    assert integer_weights({"a": 39.8, "b": 19.6, "c": 40.6}) == {"a": 199, "b": 98, "c": 203}
    assert integer_weights({"b": 0.5, "a": 1, "z": 0}) == {"a": 2, "b": 1}
    assert sum(integer_weights({"a": 0.1234567890123456, "b": 3.3333333333333335, "c": 1e-9}).values()) <= 2**60
    with pytest.raises(ValueError, match="positive"):
        Assignment({"a": 0})


def test_order_of_the_keys_does_not_matter() -> None:
    one, other = Assignment({"a": 1, "b": 2, "c": 3}), Assignment({"c": 30, "a": 10, "b": 20})
    assert np.array_equal(one.locate(np.arange(100)), other.locate(np.arange(100)))


def test_the_sequence_is_frozen() -> None:
    """These values may never change: runs exist that were fed in this order."""
    assignment = Assignment({"web": 64, "code": 25, "books": 11})
    names = [assignment.names[i] for i in assignment.locate(np.arange(12))[0]]
    assert " ".join(names) == "web code web web books web code web web code web web"
