"""Where the optimum lies, without a law of the loss: IsoFLOP parabolas and the envelope of training curves.

Chinchilla 3.2 and 3.1. Both give points (C, N) that a line in logarithms goes through: ``N = k (C / 6)^a``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_train.errors import UserError
from moe_train.plan.fit_data import Run
from moe_train.plan.scaling import PowerLaw

SAME_BUDGET = 0.1
"""Runs whose budgets differ by less than this part belong to one profile."""


@dataclass(frozen=True)
class Profile:
    """The parabola ``loss = c0 + c1 x + c2 x^2`` in x = log N of the runs of one budget, and its lowest
    point."""

    flops: float
    coefficients: tuple[float, float, float]
    params: float
    loss: float


@dataclass(frozen=True)
class FrontierFit:
    """A power law through the optima, with the 10th to 90th percentile of its exponent."""

    law: PowerLaw
    points: tuple[tuple[float, float], ...]
    """(FLOPs, optimal params)."""
    interval: tuple[float, float] | None
    profiles: tuple[Profile, ...] = ()


def budgets(runs: list[Run]) -> list[list[Run]]:
    """Runs in groups of (nearly) one budget, smallest first."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if groups and run.flops <= groups[-1][0].flops * (1 + SAME_BUDGET):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def fit_isoflop(runs: list[Run], bootstraps: int = 100, seed: int = 0) -> FrontierFit:
    """Parabolas of every budget with at least 4 sizes, and the power law through their lowest points.

    Raises UserError with fewer than 2 such budgets.
    """
    groups = [group for group in budgets(runs) if len({run.params for run in group}) >= 4]
    profiles = [profile for group in groups if (profile := _parabola(group)) is not None]
    if len(profiles) < 2:
        raise UserError(
            f"IsoFLOP profiles need 2 budgets or more, each with 4 sizes around its best; these runs have"
            f" {len(profiles)}"
        )
    points = tuple((profile.flops, profile.params) for profile in profiles)
    random, slopes = np.random.default_rng(seed), []
    for _ in range(bootstraps):
        drawn = []
        for group in groups:
            pick = [group[index] for index in random.integers(0, len(group), len(group))]
            profile = _parabola(pick) if len({run.params for run in pick}) >= 3 else None
            if profile is not None:
                drawn.append((profile.flops, profile.params))
        if len({flops for flops, _ in drawn}) >= 2:
            slopes.append(_line(drawn).a)
    return FrontierFit(_line(points), points, _interval(slopes), tuple(profiles))


def _parabola(group: list[Run]) -> Profile | None:
    """None where the runs do not enclose a minimum."""
    x = np.log([run.params for run in group])
    middle = x.mean()
    c2, c1, c0 = np.polyfit(x - middle, [run.loss for run in group], 2)
    if c2 <= 0:
        return None
    lowest = -c1 / (2 * c2)
    if not x.min() - middle - 0.5 <= lowest <= x.max() - middle + 0.5:
        return None
    flops = math.exp(float(np.mean(np.log([run.flops for run in group]))))
    shifted = (c0 - c1 * middle + c2 * middle**2, c1 - 2 * c2 * middle, c2)
    loss = c0 + c1 * lowest + c2 * lowest**2
    return Profile(flops, tuple(map(float, shifted)), float(np.exp(lowest + middle)), float(loss))


def fit_envelope(runs: list[Run], values: int = 1500, bootstraps: int = 100, seed: int = 0) -> FrontierFit:
    """The size of the lowest curve at log-spaced budgets, and the power law through them.

    Only budgets that curves of two sizes or more reach count, and of these those between the first and last
    change of the lowest curve: before and after them the optimum may lie outside of the sizes that were
    trained. Raises UserError with fewer than 3 curves, or where no two sizes are left.
    """
    curves = [run for run in runs if len(run.curve) >= 3]
    if len(curves) < 3:
        raise UserError(f"the envelope needs 3 training curves or more; these runs have {len(curves)}")
    points = _envelope(curves, values)
    if len({params for _, params in points}) < 2:
        raise UserError("the best size changes too seldom along these curves: train more sizes")
    random, slopes = np.random.default_rng(seed), []
    for _ in range(bootstraps):
        drawn = _envelope([curves[i] for i in random.integers(0, len(curves), len(curves))], values // 10)
        if len({params for _, params in drawn}) >= 2:
            slopes.append(_line(drawn).a)
    return FrontierFit(_line(points), tuple(points), _interval(slopes))


def _envelope(curves: list[Run], values: int) -> list[tuple[float, float]]:
    spans = [(6 * run.params * run.curve[0][0], 6 * run.params * run.curve[-1][0]) for run in curves]
    grid = np.geomspace(min(low for low, _ in spans), max(high for _, high in spans), values)
    losses = np.full((len(curves), values), np.inf)
    for row, (run, (low, high)) in zip(losses, zip(curves, spans, strict=True), strict=True):
        tokens, loss = np.array(run.curve).T
        inside = (grid >= low) & (grid <= high)
        row[inside] = np.interp(np.log(grid[inside]), np.log(6 * run.params * tokens), loss)
    params = np.array([run.params for run in curves])
    known = np.isfinite(losses)
    reached = [len(set(params[column])) >= 2 for column in known.T]  # elsewhere there is nothing to compare
    grid, sizes = grid[reached], params[losses[:, reached].argmin(axis=0)]
    changes = np.flatnonzero(sizes[1:] != sizes[:-1])
    if not len(changes):
        return []
    kept = slice(changes[0] + 1, changes[-1] + 1)
    return [(float(flops), float(size)) for flops, size in zip(grid[kept], sizes[kept], strict=True)]


def _line(points) -> PowerLaw:
    slope, intercept = np.polyfit(np.log([c / 6 for c, _ in points]), np.log([n for _, n in points]), 1)
    return PowerLaw(k=float(np.exp(intercept)), a=float(slope))


def _interval(slopes: list[float]) -> tuple[float, float] | None:
    if len(slopes) < 10:
        return None
    low, high = np.percentile(slopes, [10, 90])
    return float(low), float(high)
