"""The parametric fit, ``L(N, D) = E + A / N^alpha + B / D^beta`` (Chinchilla 3.3, equation 3).

Huber losses (delta 1e-3) of the logarithms are summed, not averaged: averaged, they are so small that
L-BFGS stops early, which is one of the faults that the replication found. Here the sum is scaled up
besides.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from moe_train.errors import UserError
from moe_train.plan.fit_data import Run
from moe_train.plan.scaling import ParametricLaw

DELTA = 1e-3
GRID = {
    "a": np.arange(0.0, 26.0, 5.0),
    "b": np.arange(0.0, 26.0, 5.0),
    "e": np.arange(-1.0, 1.1, 0.5),
    "alpha": np.arange(0.0, 2.1, 0.5),
    "beta": np.arange(0.0, 2.1, 0.5),
}
"""The paper's 4,500 starts."""

FEWEST = 8
"""Runs below which five constants cannot be had."""

SCALE = 1e4


@dataclass(frozen=True)
class ParametricFit:
    """The law, the summed Huber loss at it, and over the bootstraps the 10th to 90th percentile and the standard
    deviation of each constant, but for those that runs leave so open that no number holds them."""

    law: ParametricLaw
    objective: float
    intervals: dict[str, tuple[float, float]]
    errors: dict[str, float]


def fit_parametric(runs: list[Run], bootstraps: int = 100, starts: int = 60, seed: int = 0) -> ParametricFit:
    """Fit from the `starts` most promising points of the paper's grid.

    Raises UserError for fewer than 8 runs, or runs of fewer than 3 sizes or numbers of tokens.
    """
    check_enough(runs)
    log_n, log_d, log_l = (np.log([getattr(run, key) for run in runs]) for key in ("params", "tokens", "loss"))
    grid = np.array(list(itertools.product(*GRID.values())))
    values = np.array([huber_sum(point, log_n, log_d, log_l)[0] for point in grid])
    fits = [_descend(point, log_n, log_d, log_l) for point in grid[np.argsort(values, kind="stable")[:starts]]]
    best, objective = min(fits, key=lambda fit: fit[1])
    law = _law(best)
    draws = []
    random = np.random.default_rng(seed)
    intervals, errors = {}, {}
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(bootstraps):
            pick = random.integers(0, len(runs), len(runs))
            draws.append(_constants(_descend(best, log_n[pick], log_d[pick], log_l[pick])[0]))
        for index, name in enumerate(("E", "A", "B", "alpha", "beta", "a") if draws else ()):
            column = [draw[index] for draw in draws]
            low, high, error = map(float, (*np.percentile(column, [10, 90]), np.std(column)))
            if np.isfinite((low, high, error)).all():
                intervals[name], errors[name] = (low, high), error
    return ParametricFit(law, objective, intervals, errors)


def check_enough(runs: list[Run]) -> None:
    """Raise UserError unless five constants can be had from these runs."""
    if len(runs) < FEWEST:
        raise UserError(
            f"{len(runs)} run(s) are too few: the parametric law has 5 constants; give at least {FEWEST} runs"
            " that differ in size and in tokens"
        )
    for key in ("params", "tokens"):
        if len({round(float(np.log(getattr(run, key))), 3) for run in runs}) < 3:
            raise UserError(f"the runs have fewer than 3 different {key}: the law's exponents cannot be told apart")


def huber_sum(point: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_l: np.ndarray) -> tuple[float, np.ndarray]:
    """The objective at (a, b, e, alpha, beta), and its gradient."""
    a, b, e, alpha, beta = point
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    residual = top + np.log(total) - log_l
    weights /= total
    size = np.abs(residual)
    value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum()
    slope = np.clip(residual, -DELTA, DELTA)
    by_n, by_d = slope * weights[0], slope * weights[1]
    gradient = [
        by_n.sum(),
        by_d.sum(),
        (slope * weights[2]).sum(),
        -(by_n * log_n).sum(),
        -(by_d * log_d).sum(),
    ]
    return float(value), np.array(gradient)


def _descend(start: np.ndarray, *data: np.ndarray) -> tuple[np.ndarray, float]:
    """L-BFGS from one start, in coordinates centred on the data: there a and alpha are nearly independent."""
    from scipy.optimize import minimize

    middle_n, middle_d = data[0].mean(), data[1].mean()

    def uncentred(point: np.ndarray) -> np.ndarray:
        a, b, e, alpha, beta = point
        return np.array([a + alpha * middle_n, b + beta * middle_d, e, alpha, beta])

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = huber_sum(uncentred(point), *data)
        chained = gradient + np.array([0, 0, 0, gradient[0] * middle_n, gradient[1] * middle_d])
        return SCALE * value, SCALE * chained

    a, b, e, alpha, beta = start
    centred = np.array([a - alpha * middle_n, b - beta * middle_d, e, alpha, beta])
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 20}
    found = minimize(objective, centred, jac=True, method="L-BFGS-B", options=options)
    return uncentred(found.x), float(found.fun) / SCALE


def _law(point: np.ndarray) -> ParametricLaw:
    a, b, e, alpha, beta = map(float, point)
    if alpha <= 0 or beta <= 0:
        raise UserError(
            f"the best fit has the exponents alpha {alpha:.3g} and beta {beta:.3g}: the loss does not fall"
            " with size and tokens in these runs; give runs over a wider range"
        )
    return ParametricLaw(E=float(np.exp(e)), A=float(np.exp(a)), B=float(np.exp(b)), alpha=alpha, beta=beta)


def _constants(point: np.ndarray) -> tuple[float, ...]:
    a, b, e, alpha, beta = map(float, point)
    return float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta, beta / (alpha + beta)
