"""How sparse a mixture of experts should be: Abnar et al., Parameters vs FLOPs (arXiv 2501.12370).

S = (E - K) / E is the share of the MLP experts that a token does not use; N counts all parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_train.errors import UserError

LARGEST_FITTED = 0.95
"""The sparsest runs that the law was fitted on (0.98 was held out, and predicted badly: R^2 of 68%)."""

FITTED_FLOPS = (3e19, 1e21)
MLP_TO_REST = 3.0
"""Active MLP parameters of a layer per other parameter: eq. 9 has 4 d^2 for attention and 12 d^2 for one
gated MLP."""


@dataclass(frozen=True)
class SparsityLaw:
    """``L = a / N^alpha + b / D^beta + c / (1 - S)^lambda + d / ((1 - S)^delta N^gamma) + e`` (eq. 6)."""

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    lam: float
    d: float
    delta: float
    gamma: float
    e: float

    def loss(self, params: float, tokens: float, sparsity: float) -> float:
        """Expected loss in nats per token of `params` total parameters at `sparsity` after `tokens`
        tokens."""
        dense = 1.0 - check_sparsity(sparsity)
        return (
            self.a / params**self.alpha
            + self.b / tokens**self.beta
            + self.c / dense**self.lam
            + self.d / (dense**self.delta * params**self.gamma)
            + self.e
        )


ABNAR = SparsityLaw(
    a=16612.50,
    alpha=0.5962,
    b=5455.67,
    beta=0.3954,
    c=0.4598,
    lam=-0.1666,
    d=17.26,
    delta=0.1603,
    gamma=0.1595,
    e=0.94,
)
"""Table 3 of the paper."""


def check_sparsity(sparsity: float) -> float:
    """`sparsity` itself; raises UserError unless 0 <= sparsity < 1."""
    if not 0.0 <= sparsity < 1.0:
        raise UserError(
            f"a sparsity of {sparsity:g} is out of range: it is the share of experts that a token leaves out,"
            " 0 (dense) or more and less than 1"
        )
    return sparsity


def active_share(sparsity: float, mlp_to_rest: float = MLP_TO_REST) -> float:
    """Active parameters per total parameter, embeddings left out: only the MLP experts are sparse.

    With r active MLP parameters for each other one there are 1 + r active for 1 + r / (1 - S) in all.
    """
    dense = 1.0 - check_sparsity(sparsity)
    return (1 + mlp_to_rest) * dense / (dense + mlp_to_rest)


@dataclass(frozen=True)
class SparseChoice:
    """A mixture of experts that spends a budget: ``flops = 6 * active_params * tokens``."""

    sparsity: float
    params: float
    active_params: float
    tokens: float
    loss: float


def at_fixed_size(
    flops: float, params: float, sparsity: float, law: SparsityLaw = ABNAR, mlp_to_rest: float = MLP_TO_REST
) -> SparseChoice:
    """What the budget gives at a total size and a sparsity: tokens are what 6 N_active D leaves."""
    active = params * active_share(sparsity, mlp_to_rest)
    tokens = flops / (6 * active)
    return SparseChoice(sparsity, params, active, tokens, law.loss(params, tokens, sparsity))


def best_sparsity(
    flops: float,
    params: float,
    law: SparsityLaw = ABNAR,
    *,
    limit: float = LARGEST_FITTED,
    mlp_to_rest: float = MLP_TO_REST,
) -> SparseChoice:
    """The sparsity of least loss for a budget at fixed total parameters, from 0 to `limit`."""
    grid = _grid(limit)
    best = min((at_fixed_size(flops, params, s, law, mlp_to_rest) for s in grid), key=lambda choice: choice.loss)
    return _refined(best, grid, lambda s: at_fixed_size(flops, params, s, law, mlp_to_rest))


def best_size(
    flops: float, sparsity: float, law: SparsityLaw = ABNAR, *, mlp_to_rest: float = MLP_TO_REST
) -> SparseChoice:
    """The total size of least loss for a budget at one sparsity."""
    from scipy.optimize import minimize_scalar

    middle = math.log(flops) / 2  # about as many tokens as parameters: the optimum is some powers of ten from there
    found = minimize_scalar(
        lambda log_n: at_fixed_size(flops, math.exp(log_n), sparsity, law, mlp_to_rest).loss,
        bounds=(middle - math.log(1e7), middle + math.log(1e7)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return at_fixed_size(flops, math.exp(found.x), sparsity, law, mlp_to_rest)


def best_overall(
    flops: float, law: SparsityLaw = ABNAR, *, limit: float = LARGEST_FITTED, mlp_to_rest: float = MLP_TO_REST
) -> SparseChoice:
    """Size and sparsity of least loss for a budget, sparsity from 0 to `limit`."""
    grid = _grid(limit)
    best = min((best_size(flops, s, law, mlp_to_rest=mlp_to_rest) for s in grid[::4]), key=lambda choice: choice.loss)
    return _refined(best, grid[::4], lambda s: best_size(flops, s, law, mlp_to_rest=mlp_to_rest))


def _grid(limit: float) -> list[float]:
    check_sparsity(limit)
    return [limit * step / 40 for step in range(41)]


def _refined(best: SparseChoice, grid: list[float], choice_at) -> SparseChoice:
    """The optimum between the neighbours of the best point of the grid."""
    from scipy.optimize import minimize_scalar

    step = grid[1] - grid[0] if len(grid) > 1 else 0.0
    low, high = max(grid[0], best.sparsity - step), min(grid[-1], best.sparsity + step)
    if high <= low:
        return best
    found = choice_at(float(minimize_scalar(lambda s: choice_at(s).loss, bounds=(low, high), method="bounded").x))
    return found if found.loss < best.loss else best
