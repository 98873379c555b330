"""Which source feeds sample n of a segment, in closed form.

The sources are the leaves of a binary Huffman tree over their weights. A node that is given its m-th sample
hands it to the left or to the right so that of its first m samples exactly

    left(m) = round(m * w_left / w) = floor((2 m w_left + w) / (2 w))

went left. So sample n finds its source, and how many samples of that source came before it, by one descent:
no index, no state, O(number of sources) memory, the same answer for any n in any order.

**Bound.** After any n samples the count of source i differs from n * w_i / w by less than 1.68.

Proof. Let x_0 be the leaf of i, x_1 its parent, ..., x_d the root, and a_j the weight of x_j. Write e_j for
the number of samples that reached x_j less its due, n * a_j / a_d. The root has e_d = 0. Rounding at x_{j+1}
adds at most 1/2, and an error of the parent is passed on in proportion: |e_j| <= (a_j / a_{j+1}) |e_{j+1}| +
1/2. Unrolled, |e_0| <= 1/2 * sum_{j<d} a_0 / a_j. Huffman's construction merges the two lightest nodes first,
so whatever is merged with x_{j+1} later, weighing u, is no lighter than either of x_{j+1}'s children: a_{j+2}
= a_{j+1} + u >= a_{j+1} + a_j. With a_1 >= a_0 the a_j / a_0 grow at least as fast as the Fibonacci numbers
1, 1, 2, 3, 5, ..., and the sum of their reciprocals is 3.3599. Half of that is 1.68. (A tree of any other
shape, a comb for instance, has no such bound.)

Everything is integer arithmetic: weights are scaled to integers of at most 2^60 in all, exactly where they
are decimal fractions of reasonable length, else by largest remainder, so that n = 3e8 samples, and 2^50, come
out the same on every machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

_LARGEST_TOTAL = 2**60
_LARGEST_SAMPLE = 2**50


def exact_weight(weight: int | float | str) -> Fraction:
    """The number as it was written: 39.8 is 199/5, not the nearest binary fraction."""
    return Fraction(repr(weight) if isinstance(weight, float) else weight)


def integer_weights(weights: Mapping[str, int | float | str]) -> dict[str, int]:
    """Positive weights as integers in the same proportions, names sorted; zero weights are left out.

    Exact when the common denominator allows a total of at most 2^60; else the total is 2^60, shared by
    largest remainder (each proportion is then off by less than 2^-60).
    """
    exact = {name: exact_weight(weights[name]) for name in sorted(weights) if exact_weight(weights[name]) > 0}
    if not exact:
        raise ValueError("no source has a positive weight")
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    whole = {name: weight // divisor for name, weight in whole.items()}
    total = sum(whole.values())
    if total <= _LARGEST_TOTAL:
        return whole
    shares = {name: divmod(weight * _LARGEST_TOTAL, total) for name, weight in whole.items()}
    missing = _LARGEST_TOTAL - sum(share for share, _ in shares.values())
    by_remainder = sorted(shares, key=lambda name: (-shares[name][1], name))
    rounded = {name: share + (name in set(by_remainder[:missing])) for name, (share, _) in shares.items()}
    return {name: weight for name, weight in rounded.items() if weight > 0}


class Assignment:
    """The closed form for one set of weights.

    Attributes: ``names`` (the sources of positive weight, sorted), ``weights`` (their integer weights),
    ``total``.
    """

    def __init__(self, weights: Mapping[str, int | float | str]) -> None:
        whole = integer_weights(weights)
        self.names = list(whole)
        self.weights = whole
        self.total = sum(whole.values())
        self._build(list(whole.values()))

    def _build(self, leaves: list[int]) -> None:
        # Nodes 0..k-1 are the leaves in order of their names; inner nodes follow as they are made, the root
        # last. Ties go to the lower number: the tree is a function of names and weights alone.
        weight = list(leaves)
        left, right = [-1] * len(leaves), [-1] * len(leaves)
        heap = [(value, node) for node, value in enumerate(weight)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (first_weight, first), (second_weight, second) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (first_weight + second_weight, len(weight)))
            weight.append(first_weight + second_weight)
            left.append(second)  # the heavier one: its samples then come a little earlier
            right.append(first)
        self._left, self._right, self._weight = left, right, weight
        self._left_array, self._right_array = np.array(left, np.int64), np.array(right, np.int64)
        self._weight_array = np.array(weight, np.int64)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into ``names``, samples of that source before it) of each sample of the segment."""
        m = np.array(samples, np.int64, ndmin=1)
        if len(m) and (m.min() < 0 or m.max() >= _LARGEST_SAMPLE):
            raise ValueError(f"samples must lie in [0, 2^50), got {m.min()}..{m.max()}")
        node = np.full(len(m), len(self._weight) - 1, np.int64)
        active = np.flatnonzero(self._left_array[node] >= 0)
        while len(active):
            here, index = node[active], m[active]
            before = self._share(index, here)
            goes_left = self._share(index + 1, here) > before
            node[active] = np.where(goes_left, self._left_array[here], self._right_array[here])
            m[active] = np.where(goes_left, before, index - before)
            active = active[self._left_array[node[active]] >= 0]
        return node, m

    def _share(self, m: np.ndarray, node: np.ndarray) -> np.ndarray:
        """left(m), exactly, where 2 m w_left does not fit in 64 bits.

        The float quotient is within 1 of the true one (m < 2^50, four roundings of 2^-53 each), and the
        remainder, which is small, is exact although its terms wrap modulo 2^64; so one correction makes it
        the floor, whatever the float rounding was.
        """
        part, whole = self._weight_array[self._left_array[node]], self._weight_array[node]
        guess = np.floor(m * (part / whole) + 0.5).astype(np.int64)
        with np.errstate(over="ignore"):
            rest = 2 * m * part + whole - guess * (2 * whole)
        return guess + (rest >= 2 * whole) - (rest < 0)

    def locate_one(self, sample: int) -> tuple[int, int]:
        """`locate` of one sample, in Python's integers."""
        node, m = len(self._weight) - 1, sample
        while self._left[node] >= 0:
            before, after = self._share_one(m, node), self._share_one(m + 1, node)
            node, m = (self._left[node], before) if after > before else (self._right[node], m - before)
        return node, m

    def _share_one(self, m: int, node: int) -> int:
        whole = self._weight[node]
        return (2 * m * self._weight[self._left[node]] + whole) // (2 * whole)

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples come from each source."""
        reached = {len(self._weight) - 1: samples}
        # Parents have higher numbers than their children.
        for node in range(len(self._weight) - 1, len(self.names) - 1, -1):
            m = reached.pop(node)
            before = self._share_one(m, node)
            reached[self._left[node]], reached[self._right[node]] = before, m - before
        return {name: reached[node] for node, name in enumerate(self.names)}
