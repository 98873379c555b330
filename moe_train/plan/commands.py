"""The verbs of `moe-train plan`. No logic here: a verb imports one function and calls it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

app = typer.Typer(
    help="Plan a run before paying for it: size, memory, layout, cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, in plain units.")]


@app.command("compute-optimal")
def compute_optimal(
    flops: Annotated[Optional[str], typer.Option(metavar="C", help="The budget in operations.")] = None,
    gpu_hours: Annotated[Optional[str], typer.Option(metavar="H", help="The budget in GPU-hours.")] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="With --gpu-hours: a preset or file of hardware.")] = "h100",
    mfu: Annotated[float, typer.Option(metavar="PART", help="With --gpu-hours: the part of the peak reached.")] = 0.4,
    params: Annotated[Optional[str], typer.Option(metavar="N", help="The optimum of this size.")] = None,
    tokens: Annotated[Optional[str], typer.Option(metavar="D", help="The optimum for so many tokens.")] = None,
    total_params: Annotated[
        Optional[str], typer.Option(metavar="N", help="Also the best sparsity at this total size.")
    ] = None,
    sparsity: Annotated[
        Optional[float], typer.Option(metavar="S", help="Also the best size at this share of experts left out.")
    ] = None,
    law: Annotated[Optional[str], typer.Option(metavar="LAW.json", help="Also a law that `plan fit` wrote.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what size and how many tokens a budget is best spent on.

    \b
    moe-train plan compute-optimal --flops 5.76e23
    moe-train plan compute-optimal --gpu-hours 30000 --gpu h100 --mfu 0.16 --total-params 8.5B
    """
    from moe_train.plan.compute_optimal import compute_optimal as show

    show(
        flops=flops,
        gpu_hours=gpu_hours,
        gpu=gpu,
        mfu=mfu,
        params=params,
        tokens=tokens,
        total_params=total_params,
        sparsity=sparsity,
        law=law,
        as_json=as_json,
    )
