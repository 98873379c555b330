"""`moe-train plan sweep`: the run files of an IsoFLOP or sparsity sweep over small models of one kind, ready
to launch."""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.target import check_target
from data_pipeline.units import format_count
from moe_train.config import RunConfig, load_run
from moe_train.errors import UserError
from moe_train.model.config import ModelConfig
from moe_train.plan.quantities import positive, table
from moe_train.plan.scaling import REPLICATION
from moe_train.plan.sparsity import check_sparsity

SPREAD = 4.0
"""Sizes of a budget lie between its expected optimum divided and multiplied by this."""

FEWEST_STEPS = 50


@dataclass(frozen=True)
class Planned:
    """One run of the sweep. `params` are active ones, and ``6 * params * tokens`` is the budget nearly."""

    name: str
    file: str
    flops: float
    params: int
    total_params: int
    sparsity: float
    tokens: int
    steps: int


def sweep(
    budgets: list[str],
    *,
    base: str,
    out: str,
    sizes: int = 7,
    around: str | None = None,
    sparsities: list[float] | None = None,
    as_json: bool = False,
) -> None:
    """Write a run file and a mixture file for every run of the sweep, `sweep.csv`, and `sweep.sh` that runs
    them.

    Args:
        budgets: operations of one run each, as 6 N_active D.
        base: the run file that all but model, mixture's length, schedule's lengths and folder comes from.
        out: a folder that is empty or does not exist.
        sizes: models of each budget, from a quarter to four times the expected optimum.
        around: that optimum in active parameters; None: the replication's law, extrapolated.
        sparsities: also vary the share of MLP experts that a token leaves out, at the base's top_k.

    Raises UserError, one line.
    """
    config = load_run(base)
    amounts = [positive(text, "budget") for text in budgets]
    if not amounts:
        raise UserError("give one budget or more, in operations, such as 1e15 3e15")
    if sizes < 1:
        raise UserError(f"--sizes must be 1 or more, not {sizes}")
    folder = check_target(out, "--out", folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder")
    if sparsities and not config.model.mlp.num_experts:
        raise UserError(f"--sparsity varies the experts of a mixture, and the MLP of {base} is dense; leave it out")
    middle = positive(around, "--around") if around is not None else None
    shares = [check_sparsity(s) for s in sparsities] if sparsities else [None]
    plans = [
        (plan, model)
        for flops in amounts
        for share in shares
        for plan, model in _of_budget(config, flops, share, sizes, middle, folder)
    ]
    plans = list({plan.name: (plan, model) for plan, model in plans}.values())  # sparsities may have the same experts
    folder.mkdir(parents=True, exist_ok=True)
    for plan, model in plans:
        _write(plan, model, config, folder)
    rows = [asdict(plan) for plan, _ in plans]
    with open(folder / "sweep.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    script = [
        "#!/bin/sh",
        "# Runs one after the other; a run that is complete is left alone, an interrupted one goes on.",
    ]
    script += [f'moe-train pretrain "{folder.resolve() / plan.file}" "$@" || exit $?' for plan, _ in plans]
    (folder / "sweep.sh").write_text("\n".join(script) + "\n", encoding="utf-8")
    (folder / "sweep.sh").chmod(0o755)
    print(json.dumps({"folder": str(folder), "runs": rows}) if as_json else _render(rows, out))


def _of_budget(
    config: RunConfig, flops: float, sparsity: float | None, sizes: int, middle: float | None, folder: Path
) -> list[tuple[Planned, ModelConfig]]:
    """The distinct models of one budget and sparsity, smallest first, each with its tokens."""
    optimum = middle or REPLICATION.frontier.at_flops(flops).params
    factors = [SPREAD ** (2 * index / (sizes - 1) - 1) for index in range(sizes)] if sizes > 1 else [1.0]
    models = {model.hidden_size: model for model in (_shaped(config.model, optimum * f, sparsity) for f in factors)}
    result = []
    for _, model in sorted(models.items()):
        active = model.num_active_parameters()
        steps = round(flops / (6 * active) / config.tokens_per_step)
        if steps < FEWEST_STEPS:
            raise UserError(
                f"a budget of {flops:.3g} gives {format_count(active)} active parameters {steps} steps of"
                f" {format_count(config.tokens_per_step)} tokens, fewer than {FEWEST_STEPS}: give a larger"
                " budget, a smaller --around, or a smaller training.global_batch_size in the base run"
            )
        actual = model.mlp.sparsity
        name = f"c{flops:g}-n{format_count(active, 2)}-s{actual:g}".replace("+", "")
        result.append(
            (
                Planned(
                    name=name,
                    file=f"{name}.yaml",
                    flops=6.0 * active * steps * config.tokens_per_step,
                    params=active,
                    total_params=model.num_parameters(),
                    sparsity=actual,
                    tokens=steps * config.tokens_per_step,
                    steps=steps,
                ),
                model,
            )
        )
    return result


def _shaped(base: ModelConfig, active: float, sparsity: float | None) -> ModelConfig:
    """The base's proportions (width to depth, width to heads, width to experts) at the nearest active
    size."""
    widths = range(base.attention.head_dim, 1 << 15, base.attention.head_dim)

    def size(width: int) -> int:
        return _of_width(base, width, sparsity).num_active_parameters()

    above = bisect_left(widths, active, key=size)
    if above == len(widths):
        raise UserError(
            f"{active:.3g} active parameters are more than a model in the base's proportions can have,"
            f" {format_count(size(widths[-1]), 2)}: give a smaller budget or --around"
        )
    width = min(widths[max(0, above - 1) : above + 1], key=lambda width: abs(math.log(size(width) / active)))
    return _of_width(base, width, sparsity)


def _of_width(base: ModelConfig, width: int, sparsity: float | None) -> ModelConfig:
    factor = width / base.hidden_size
    ffn = max(16, round(base.mlp.ffn_hidden_size * factor / 16) * 16)
    mlp = base.mlp.model_copy(update={"ffn_hidden_size": ffn})
    if sparsity is not None:
        experts = max(mlp.top_k, round(mlp.top_k / (1 - sparsity)))
        mlp = mlp.model_copy(update={"num_experts": experts})
    return base.model_copy(
        update={
            "hidden_size": width,
            "num_layers": max(1, round(base.num_layers * factor)),
            "attention": base.attention.scaled(factor),
            "mlp": mlp,
        }
    )


def _write(plan: Planned, model: ModelConfig, config: RunConfig, folder: Path) -> None:
    """A mixture of the base's phases in proportion, and a run file that names it."""
    import yaml

    mixture = config.mixture.model_dump(mode="json", exclude_none=True)
    whole = config.total_tokens
    mixture.pop("total_tokens", None)
    ends, seen = [], 0
    for phase in config.mixture.phases:
        seen += phase.tokens
        ends.append(plan.tokens * seen // whole)
    for phase, begin, end in zip(mixture["phases"], [0, *ends[:-1]], ends, strict=True):
        phase["tokens"] = end - begin
    _dump(folder / f"{plan.name}.mixture.yaml", yaml.safe_dump(mixture, sort_keys=False))
    run = config.model_dump(mode="json", by_alias=True)
    run |= {"output_dir": str((folder / plan.name).resolve()), "model": model.model_dump(mode="json")}
    run["data"] = {**run["data"], "mixture": f"{plan.name}.mixture.yaml"}
    run["parallel"] |= {"tensor": 1, "pipeline": 1, "virtual_pipeline": None, "expert": 1}
    run["schedule"] |= {"warmup": None, "decay": None}  # in proportion to the run
    run["training"] |= {"max_steps": None, "batch_size_warmup": None}
    text = f"# {plan.name}: {plan.params:,} active of {plan.total_params:,} parameters, {plan.steps} steps\n"
    _dump(folder / plan.file, text + yaml.safe_dump(run, sort_keys=False))
    load_run(folder / plan.file)


def _dump(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _render(rows: list[dict[str, Any]], out: str) -> str:
    cells = [
        [
            row["file"],
            format_count(row["params"], 2),
            format_count(row["total_params"], 2),
            f"{row['sparsity']:.3g}",
            format_count(row["tokens"], 2),
            str(row["steps"]),
            f"{row['flops']:.3g}",
        ]
        for row in rows
    ]
    whole = sum(row["flops"] for row in rows)
    lines = [
        table(
            f"{len(rows)} runs in {out}",
            ["run file", "active", "total", "sparsity", "tokens", "steps", "6ND"],
            cells,
        )
    ]
    lines.append(f"{whole:.3g} operations in all; start them with {out}/sweep.sh, fit them with")
    lines.append(f"moe-train plan fit {out}/c*/ --out law.json --plot law.png")
    return "\n".join(lines)
