"""`moe-train plan fit`: scaling laws of one's own runs, by every method that the runs allow."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from data_pipeline.target import check_target
from moe_train.errors import UserError
from moe_train.plan.fit_data import load_runs, with_curves
from moe_train.plan.fit_frontier import fit_envelope, fit_isoflop
from moe_train.plan.fit_parametric import check_enough, fit_parametric
from moe_train.plan.fit_sparsity import fit_sparsity
from moe_train.plan.law_file import save_law
from moe_train.plan.quantities import table


def fit(
    paths: list[str],
    *,
    out: str | None = None,
    plot: str | None = None,
    bootstraps: int = 100,
    starts: int = 60,
    drop_highest: int = 0,
    as_json: bool = False,
) -> None:
    """Fit the runs in `paths` (CSV files, run folders) and print the laws.

    Args:
        out: where to write the laws; `plan compute-optimal --law` reads the file.
        plot: where to write a PNG.
        bootstraps: resamplings of the runs, for the intervals (10th to 90th percentile); 0: none.
        starts: of the grid's 4,500 starting points, how many (the most promising) are descended from.
        drop_highest: runs of highest loss to leave out (the replication leaves out 5 of Chinchilla's 245).

    Raises UserError, one line, for what is not a run and for too few runs. The parametric fit must succeed;
    of the others the report says why there is none.
    """
    if bootstraps < 0 or starts < 1 or drop_highest < 0:
        raise UserError("--bootstraps and --drop-highest must be 0 or more, --starts 1 or more")
    for name, path in (("--out", out), ("--plot", plot)):
        if path is not None:
            check_target(path, name)
    runs = load_runs(paths, drop_highest)
    check_enough(runs)
    parametric = fit_parametric(runs, bootstraps, starts)
    isoflop, why_no_isoflop = _attempt(fit_isoflop, runs, bootstraps=bootstraps)
    envelope, why_no_envelope = _attempt(fit_envelope, with_curves(runs), bootstraps=bootstraps)
    sparsity, why_no_sparsity = _attempt(fit_sparsity, runs)
    frontier = parametric.law.frontier
    report: dict[str, Any] = {
        "runs": len(runs),
        "range": {
            key: [min(getattr(run, key) for run in runs), max(getattr(run, key) for run in runs)]
            for key in ("params", "tokens", "flops", "sparsity")
        },
        "parametric": {
            "constants": asdict(parametric.law),
            "frontier": asdict(frontier),
            "objective": parametric.objective,
            "intervals": {name: list(pair) for name, pair in parametric.intervals.items()},
            "standard_errors": parametric.errors,
        },
        "isoflop": _frontier(isoflop, why_no_isoflop),
        "envelope": _frontier(envelope, why_no_envelope),
        "sparsity": {
            "constants": asdict(sparsity.law),
            "objective": sparsity.objective,
            "mean_squared_error": sparsity.mean_squared_error,
        }
        if sparsity
        else {"none_because": why_no_sparsity},
    }
    if out is not None:
        save_law(out, report)
    if plot is not None:
        from moe_train.plan.fit_plot import plot as draw

        draw(plot, runs, parametric, isoflop, envelope)
    print(json.dumps(report) if as_json else render(report))


def _attempt(method, runs, **options) -> tuple[Any, str | None]:
    try:
        return method(runs, **options), None
    except UserError as error:
        return None, str(error)


def _frontier(found, why: str | None) -> dict[str, Any]:
    if found is None:
        return {"none_because": why}
    return {
        "frontier": asdict(found.law),
        "interval_of_a": found.interval and list(found.interval),
        "profiles": [asdict(profile) for profile in found.profiles],
    }


def render(report: dict[str, Any]) -> str:
    """Constants with their intervals, and the exponent of each method."""
    parametric = report["parametric"]
    rows = []
    for name, value in {**parametric["constants"], "a": parametric["frontier"]["a"]}.items():
        low, high = parametric["intervals"].get(name, (None, None))
        error = parametric["standard_errors"].get(name)
        interval = f"{low:.5g} to {high:.5g}" if low is not None else "-"
        rows.append([name, f"{value:.5g}", interval, f"{error:.3g}" if error is not None else "-"])
    title = f"L = E + A / N^alpha + B / D^beta, {report['runs']} runs"
    lines = [table(title, ["constant", "value", "10% to 90%", "standard error"], rows)]
    rows = [["parametric", f"{parametric['frontier']['a']:.4f}", f"{1 - parametric['frontier']['a']:.4f}"]]
    notes = []
    for name in ("isoflop", "envelope"):
        if "none_because" in report[name]:
            notes.append(f"no {name} fit: {report[name]['none_because']}")
        else:
            exponent = report[name]["frontier"]["a"]
            rows.append([name, f"{exponent:.4f}", f"{1 - exponent:.4f}"])
    lines.append(table("compute-optimal exponents", ["method", "N ~ C^a", "D ~ C^b"], rows))
    sparsity = report["sparsity"]
    if "none_because" in sparsity:
        notes.append(f"no sparsity law: {sparsity['none_because']}")
    else:
        rows = [[name, f"{value:.5g}"] for name, value in sparsity["constants"].items()]
        lines.append(table("sparsity law", ["constant", "value"], rows))
    return "\n".join(lines + notes)
