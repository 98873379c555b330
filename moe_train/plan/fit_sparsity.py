"""The sparsity law (arXiv 2501.12370, eq. 6) fitted to runs of several sparsities.

Ten constants: the objective is the parametric fit's (Huber of the logarithm, delta 1e-3, summed), the
starts are the published constants and random ones around them. Single constants are told apart badly; what
counts is the law's loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_train.errors import UserError
from moe_train.plan.fit_data import Run
from moe_train.plan.fit_parametric import DELTA, SCALE
from moe_train.plan.sparsity import ABNAR, SparsityLaw

FEWEST = 20
"""Runs below which ten constants cannot be had."""


@dataclass(frozen=True)
class SparsityFit:
    """The law, the summed Huber loss at it, and the mean squared error of its losses."""

    law: SparsityLaw
    objective: float
    mean_squared_error: float


def fit_sparsity(runs: list[Run], starts: int = 12, seed: int = 0) -> SparsityFit:
    """Fit the law in total parameters, tokens and sparsity.

    Raises UserError for fewer than 20 runs or fewer than 3 sparsities.
    """
    from scipy.optimize import minimize

    if len(runs) < FEWEST or len({round(run.sparsity, 3) for run in runs}) < 3:
        raise UserError(
            f"the sparsity law has 10 constants: give at least {FEWEST} runs of at least 3 sparsities"
            f" (these are {len(runs)} of {len({round(run.sparsity, 3) for run in runs})})"
        )
    log_n, log_d = (np.log([getattr(run, key) for run in runs]) for key in ("total_params", "tokens"))
    log_s, log_l = np.log([1 - run.sparsity for run in runs]), np.log([run.loss for run in runs])

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        a, alpha, b, beta, c, lam, d, delta, gamma, e = point
        terms = np.stack(
            [
                a - alpha * log_n,
                b - beta * log_d,
                c - lam * log_s,
                d - delta * log_s - gamma * log_n,
                np.full_like(log_n, e),
            ]
        )
        top = terms.max(axis=0)
        weights = np.exp(terms - top)
        total = weights.sum(axis=0)
        residual = top + np.log(total) - log_l
        size = np.abs(residual)
        value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum()
        slope = np.clip(residual, -DELTA, DELTA) * weights / total
        gradient = [slope[0].sum(), -(slope[0] * log_n).sum(), slope[1].sum(), -(slope[1] * log_d).sum()]
        gradient += [slope[2].sum(), -(slope[2] * log_s).sum(), slope[3].sum(), -(slope[3] * log_s).sum()]
        gradient += [-(slope[3] * log_n).sum(), slope[4].sum()]
        return SCALE * float(value), SCALE * np.array(gradient)

    published = _point(ABNAR)
    random = np.random.default_rng(seed)
    begins = [published] + [published + random.normal(0, 0.3, 10) for _ in range(starts - 1)]
    options = {"maxiter": 4000, "maxfun": 8000, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 30}
    found = min(
        (minimize(objective, start, jac=True, method="L-BFGS-B", options=options) for start in begins),
        key=lambda result: result.fun,
    )
    law = _law(found.x)
    errors = [law.loss(run.total_params, run.tokens, run.sparsity) - run.loss for run in runs]
    return SparsityFit(law, float(found.fun) / SCALE, float(np.mean(np.square(errors))))


def _point(law: SparsityLaw) -> np.ndarray:
    log_a, log_b, log_c, log_d, log_e = np.log([law.a, law.b, law.c, law.d, law.e])
    return np.array(
        [log_a, law.alpha, log_b, law.beta, log_c, law.lam, log_d, law.delta, law.gamma, log_e], dtype=float
    )


def _law(point: np.ndarray) -> SparsityLaw:
    a, alpha, b, beta, c, lam, d, delta, gamma, e = map(float, point)
    a, b, c, d, e = map(float, np.exp([a, b, c, d, e]))
    return SparsityLaw(a=a, alpha=alpha, b=b, beta=beta, c=c, lam=lam, d=d, delta=delta, gamma=gamma, e=e)
