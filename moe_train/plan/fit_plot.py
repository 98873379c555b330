"""A picture of a fit: losses against the law, IsoFLOP profiles, and the optima that each method finds."""

from __future__ import annotations

import os

import numpy as np

from data_pipeline.units import format_count
from moe_train.plan.fit_data import Run
from moe_train.plan.fit_frontier import FrontierFit, budgets
from moe_train.plan.fit_parametric import ParametricFit


def plot(
    path: str | os.PathLike[str],
    runs: list[Run],
    parametric: ParametricFit | None,
    isoflop: FrontierFit | None,
    envelope: FrontierFit | None,
) -> None:
    """Write a PNG with three panels; a method without a fit is left out of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    against, profiles, frontier = figure.subplots(1, 3)
    flops = np.array([run.flops for run in runs])
    losses = np.array([run.loss for run in runs])
    if parametric is not None:
        expected = [parametric.law.loss(run.params, run.tokens) for run in runs]
        points = against.scatter(expected, losses, c=np.log10(flops), s=12)
        figure.colorbar(points, ax=against, label="log10 FLOPs")
        ends = [losses.min(), losses.max()]
        against.plot(ends, ends, color="black", linewidth=0.8)
    against.set(xlabel="loss by the parametric law", ylabel="loss of the run", title="parametric fit")
    groups = [group for group in budgets(runs) if len(group) >= 4]
    for number, group in enumerate(groups):
        color, spent = f"C{number % 10}", group[0].flops
        sizes = [run.params for run in group]
        profiles.scatter(sizes, [run.loss for run in group], s=12, color=color, label=f"{spent:.2g} FLOPs")
    for profile in isoflop.profiles if isoflop else ():
        nearest = min(range(len(groups)), key=lambda number: abs(np.log(groups[number][0].flops / profile.flops)))
        x = np.linspace(np.log(profile.params) - 1.2, np.log(profile.params) + 1.2, 60)
        c0, c1, c2 = profile.coefficients
        profiles.plot(np.exp(x), c0 + c1 * x + c2 * x**2, linewidth=0.8, color=f"C{nearest % 10}")
    profiles.set(xscale="log", xlabel="parameters", ylabel="loss", title="IsoFLOP profiles")
    if groups:
        profiles.legend(fontsize="x-small")
    span = np.geomspace(flops.min(), flops.max(), 50)
    fits = {"parametric": parametric.law.frontier if parametric else None}
    for name, fit in (("IsoFLOP", isoflop), ("envelope", envelope)):
        fits[name] = fit.law if fit else None
        if fit:
            frontier.scatter(*zip(*fit.points, strict=True), s=6, alpha=0.4)
    for name, law in fits.items():
        if law is not None:
            label = f"{name}: N ~ C^{law.a:.3f}"
            frontier.plot(span, [law.at_flops(c).params for c in span], label=label, linewidth=1)
    frontier.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="optimal parameters", title="compute-optimal size")
    if frontier.get_legend_handles_labels()[0]:
        frontier.legend(fontsize="x-small")
    for axis in (profiles.xaxis, frontier.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda size, _: format_count(size, 0)))
        axis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=110, format="png")
