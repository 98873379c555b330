"""`moe-train plan compute-optimal`: what the scaling laws say about a budget, side by side."""

from __future__ import annotations

import json
from typing import Any

from moe_train.errors import UserError
from moe_train.plan import scaling
from moe_train.plan import sparsity as sparse_law
from moe_train.plan.dense_flops import appendix_f_flops
from moe_train.plan.law_file import load_law
from moe_train.plan.quantities import part, positive, table
from moe_train.plan.scaling import ParametricLaw, PowerLaw
from moe_train.plan.sparsity import SparsityLaw

NAMES = {
    "1": "1 training curves",
    "2": "2 IsoFLOP profiles",
    "3": "3 parametric fit",
    "replication": "replication",
    "fitted": "your fit",
}


def compute_optimal(
    *,
    flops: str | None = None,
    gpu_hours: str | None = None,
    gpu: str | None = None,
    mfu: float | None = None,
    params: str | None = None,
    tokens: str | None = None,
    total_params: str | None = None,
    sparsity: float | None = None,
    law: str | None = None,
    as_json: bool = False,
) -> None:
    """Print sizes, tokens and losses for one budget, size or number of tokens.

    Args:
        flops: the budget in operations; or
        gpu_hours: in GPU-hours of `gpu` (None: h100) at the utilisation `mfu` (None: 0.4); or
        params, tokens: the optimum of that size, or for that many tokens.
        total_params: of the sparsity law: also the best sparsity at this total size.
        sparsity: also the best size at this share of experts left out.
        law: a file that `plan fit` wrote.

    Raises UserError, one line, for anything but exactly one positive budget.
    """
    try:
        report = answer(
            flops=flops,
            gpu_hours=gpu_hours,
            gpu=gpu,
            mfu=mfu,
            params=params,
            tokens=tokens,
            total_params=total_params,
            sparsity=sparsity,
            law=law,
        )
    except (OverflowError, ZeroDivisionError):  # of a power law
        raise UserError("the laws cannot be computed so far out: give what is nearer to what can be trained") from None
    print(json.dumps(report) if as_json else render(report))


def answer(
    *,
    flops: str | None = None,
    gpu_hours: str | None = None,
    gpu: str | None = None,
    mfu: float | None = None,
    params: str | None = None,
    tokens: str | None = None,
    total_params: str | None = None,
    sparsity: float | None = None,
    law: str | None = None,
) -> dict[str, Any]:
    """The report of `compute_optimal` in plain units: parameters, tokens, operations, nats per token."""
    given = {"--flops": flops, "--gpu-hours": gpu_hours, "--params": params, "--tokens": tokens}
    chosen = [(option, text) for option, text in given.items() if text is not None]
    if len(chosen) != 1:
        raise UserError("give one of --flops, --gpu-hours, --params and --tokens")
    option, text = chosen[0]
    amount = positive(text, option)
    if option == "--gpu-hours":
        from moe_train.plan.hardware import load_hardware

        peak = load_hardware("h100" if gpu is None else gpu).peak_flops
        amount *= 3600 * peak * part(0.4 if mfu is None else mfu, "--mfu")
    elif gpu is not None or mfu is not None:
        raise UserError(f"{'--gpu' if gpu is not None else '--mfu'} says what --gpu-hours are worth; leave it out")
    fitted = load_law(law) if law is not None else None
    approaches = {
        name: _approach(frontier, loss_law, option, amount, scaling.FITTED_RANGE)
        for name, (frontier, loss_law) in _published().items()
    }
    if fitted is not None:
        own = fitted.parametric
        approaches["fitted"] = _approach(own.frontier, own, option, amount, fitted.range)
    budget = approaches["replication"]["flops"]
    total = positive(total_params, "--total-params") if total_params is not None else None
    own_sparse = fitted.sparsity if fitted is not None else None
    return {
        "given": {"option": option.removeprefix("--"), "amount": amount},
        "approaches": approaches,
        "sparsity": _sparsity(budget, total, sparsity, own_sparse, fitted.range if own_sparse else {}),
    }


def _published() -> dict[str, tuple[PowerLaw, ParametricLaw]]:
    """Name -> where the optimum lies, and the law that says what loss it has."""
    third = scaling.CHINCHILLA_3
    return {
        "1": (scaling.CHINCHILLA_1, third),
        "2": (scaling.CHINCHILLA_2, third),
        "3": (third.frontier, third),
        "replication": (scaling.REPLICATION.frontier, scaling.REPLICATION),
    }


def _approach(
    frontier: PowerLaw,
    law: ParametricLaw,
    option: str,
    amount: float,
    fitted: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    at = {"--params": frontier.at_params, "--tokens": frontier.at_tokens}.get(option, frontier.at_flops)
    best = at(amount)
    return {
        "params": best.params,
        "tokens": best.tokens,
        "loss": law.loss(best.params, best.tokens),
        "loss_by_replication": scaling.REPLICATION.loss(best.params, best.tokens),
        "tokens_per_param": best.tokens / best.params,
        "flops": best.flops,
        "flops_appendix_f": appendix_f_flops(best.params, best.tokens),
        "outside_fitted_range": scaling.outside(best.flops, best.params, best.tokens, fitted),
    }


def _sparsity(
    flops: float,
    total: float | None,
    asked: float | None,
    own: SparsityLaw | None,
    fitted: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """The sparsity law (one's own, or the published one) at this budget: free, at fixed total sizes, and
    the best size of each sparsity."""
    law = own or sparse_law.ABNAR
    limit = fitted.get("sparsity", (0.0, sparse_law.LARGEST_FITTED))[1]
    low, high = fitted.get("flops", sparse_law.FITTED_FLOPS)
    dense = sparse_law.best_size(flops, 0.0, law)
    totals = [total] if total is not None else [dense.params * factor for factor in (1, 4, 16)]
    shares = sorted({0.0, 0.25, 0.5, 0.75, 0.9, 0.95, *([asked] if asked is not None else [])})
    notes = []
    if asked is not None and sparse_law.check_sparsity(asked) > limit:
        notes.append(f"sparsity {asked:g} is more than the {limit:g} that the law was fitted on")
    if not low <= flops <= high:
        notes.append(f"flops {flops:.3g} is outside of the {low:.3g} to {high:.3g} that it was fitted on")
    free = sparse_law.best_overall(flops, law, limit=limit)
    if free.sparsity > 0.999 * limit:
        notes.append(
            f"without a limit on the total size it asks for all the sparsity it was fitted on ({limit:g});"
            " memory, not the law, sets the limit"
        )
    return {
        "law": "fitted" if own else "published",
        "flops": flops,
        "free": vars(free),
        "fixed_total": [vars(sparse_law.best_sparsity(flops, size, law, limit=limit)) for size in totals],
        "by_sparsity": [vars(sparse_law.best_size(flops, s, law)) for s in shares],
        "outside_fitted_range": notes,
    }


# --- for people ---------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The report as tables and notes."""
    from data_pipeline.units import format_count as count

    rows = [
        [
            NAMES[name],
            count(row["params"], 2),
            count(row["tokens"], 2),
            f"{row['tokens_per_param']:.1f}",
            f"{row['loss']:.3f}",
            f"{row['loss_by_replication']:.3f}",
            f"{row['flops']:.3g}",
            f"{row['flops_appendix_f']:.3g}",
        ]
        for name, row in report["approaches"].items()
    ]
    columns = [
        "approach",
        "params",
        "tokens",
        "tokens/param",
        "loss",
        "loss (replication)",
        "6ND",
        "appendix F",
    ]
    given = report["given"]
    lines = [table(f"compute-optimal dense models, {_title(given)}", columns, rows)]
    sparse = report["sparsity"]
    columns = ["mixture of experts", "sparsity", "total", "active", "tokens", "loss"]
    chosen = [("free", sparse["free"])]
    chosen += [(f"best at {count(row['params'], 2)} total", row) for row in sparse["fixed_total"]]
    chosen += [(f"best size at sparsity {row['sparsity']:g}", row) for row in sparse["by_sparsity"]]
    rows = [
        [
            name,
            f"{row['sparsity']:.3f}",
            count(row["params"], 2),
            count(row["active_params"], 2),
            count(row["tokens"], 2),
            f"{row['loss']:.3f}",
        ]
        for name, row in chosen
    ]
    lines.append(table(f"{sparse['law']} sparsity law at {sparse['flops']:.3g} operations", columns, rows))
    for name, row in report["approaches"].items():
        lines += [f"outside the fitted range ({NAMES[name]}): {note}" for note in row["outside_fitted_range"]]
    lines += [f"sparsity law: {note}" for note in sparse["outside_fitted_range"]]
    lines.append(
        "losses of 1 to 3 are by approach 3's law; the sparsity law was fitted on other data:"
        " compare losses within a table"
    )
    return "\n".join(lines)


def _title(given: dict[str, Any]) -> str:
    from data_pipeline.units import format_count as count

    amount = given["amount"]
    if given["option"] in ("params", "tokens"):
        return f"of {count(amount)} {'parameters' if given['option'] == 'params' else 'tokens'}"
    return f"for {amount:.3g} operations"
