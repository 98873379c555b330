"""Dense scaling laws: Chinchilla's three approaches (arXiv 2203.15556) and the replication (arXiv
2404.10102).

N is parameters, D tokens, C training operations, and C = 6 N D throughout, as the laws were fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_train.errors import UserError


@dataclass(frozen=True)
class Allocation:
    """A size and a number of tokens that spend a budget: ``flops = 6 * params * tokens``."""

    params: float
    tokens: float

    @property
    def flops(self) -> float:
        return 6.0 * self.params * self.tokens


@dataclass(frozen=True)
class PowerLaw:
    """``N_opt = k (C / 6)^a`` and ``D_opt = (C / 6)^(1 - a) / k``."""

    k: float
    a: float

    def at_flops(self, flops: float) -> Allocation:
        """The optimum for a budget."""
        params = self.k * (flops / 6) ** self.a
        return Allocation(params, flops / 6 / params)

    def at_params(self, params: float) -> Allocation:
        """The optimum whose size is `params`."""
        return self.at_flops(6 * (params / self.k) ** (1 / self.a))

    def at_tokens(self, tokens: float) -> Allocation:
        """The optimum that sees `tokens`."""
        return self.at_flops(6 * (tokens * self.k) ** (1 / (1 - self.a)))


@dataclass(frozen=True)
class ParametricLaw:
    """``L(N, D) = E + A / N^alpha + B / D^beta`` (Chinchilla eq. 10), in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value > 0 for value in (self.E, self.A, self.B, self.alpha, self.beta)):
            raise UserError(f"a parametric law needs five positive numbers E, A, B, alpha, beta; got {self}")

    def loss(self, params: float, tokens: float) -> float:
        """Expected loss of `params` parameters after `tokens` tokens."""
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    @property
    def frontier(self) -> PowerLaw:
        """Where the loss is least for each budget (eq. 4): ``a = beta / (alpha + beta)``."""
        total = self.alpha + self.beta
        k = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        return PowerLaw(k, self.beta / total)


CHINCHILLA_1 = PowerLaw(k=0.2420627467390364, a=0.49809869)
"""Envelope of training curves. The paper rounds a to 0.50 and prints no factor: a line in logarithms
through the nine rows of Table 3, which it meets within 0.4% (67B: 1.3%)."""

CHINCHILLA_2 = PowerLaw(k=0.34853651014718806, a=0.48994161)
"""IsoFLOP profiles, in the same way from Table A3 (within 0.6%; its 67B row was made for about 69B)."""

CHINCHILLA_3 = ParametricLaw(
    E=math.exp(0.5267228), A=math.exp(6.0073404), B=math.exp(6.0179186), alpha=0.33917084, beta=0.2849083
)
"""The constants in the paper's TeX source. As printed (1.69, 406.4, 410.7, 0.34, 0.28) they are rounded so
far that the optimum for 5.76e23 falls from 40.4B to 32.2B parameters."""

REPLICATION = ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""Besiroglu et al., from 240 of the 245 points of Chinchilla's Figure 4."""

REPLICATION_ERRORS = {"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02}
"""Standard errors of the replication's constants."""

FITTED_RANGE = {"flops": (6e18, 3e21), "params": (7e7, 1.6e10), "tokens": (5e9, 5e11)}
"""What Chinchilla trained: IsoFLOP budgets, sizes and tokens."""


def outside(
    flops: float, params: float, tokens: float, fitted: Mapping[str, tuple[float, float]] = FITTED_RANGE
) -> list[str]:
    """In words, which of the three lie outside of what a law was fitted on, and by what factor."""
    notes = []
    for name, value in (("flops", flops), ("params", params), ("tokens", tokens)):
        low, high = fitted.get(name, (0.0, math.inf))
        if value > high:
            notes.append(f"{name} {value:.3g} is {value / high:.3g} times the largest fitted ({high:.3g})")
        elif value < low:
            notes.append(f"{name} {value:.3g} is {low / value:.3g} times below the smallest fitted ({low:.3g})")
    return notes
