"""The verbs of `moe-train plan`. No logic here: a verb imports one function and calls it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from moe_train.overrides import OVERRIDES, Overrides

app = typer.Typer(
    help="Plan a run before paying for it: size, memory, layout, cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Run = Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run file, or the name of a preset.")]
Gpu = Annotated[str, typer.Option(metavar="NAME", help="A preset or file of hardware.")]
Nodes = Annotated[Optional[int], typer.Option(min=1, metavar="N", help="Nodes; else those of the run file.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, in plain units.")]


@app.command("compute-optimal")
def compute_optimal(
    flops: Annotated[Optional[str], typer.Option(metavar="C", help="The budget in operations.")] = None,
    gpu_hours: Annotated[Optional[str], typer.Option(metavar="H", help="The budget in GPU-hours.")] = None,
    gpu: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="With --gpu-hours: a preset or file of hardware; else h100.")
    ] = None,
    mfu: Annotated[
        Optional[float], typer.Option(metavar="PART", help="With --gpu-hours: the part of the peak reached; else 0.4.")
    ] = None,
    params: Annotated[Optional[str], typer.Option(metavar="N", help="The optimum for a model of this size.")] = None,
    tokens: Annotated[Optional[str], typer.Option(metavar="D", help="The optimum for so many tokens.")] = None,
    total_params: Annotated[
        Optional[str], typer.Option(metavar="N", help="Also the best sparsity at this total size.")
    ] = None,
    sparsity: Annotated[
        Optional[float],
        typer.Option(metavar="S", help="Also the best size at this share of experts left out."),
    ] = None,
    law: Annotated[Optional[str], typer.Option(metavar="LAW.json", help="Also a law that `plan fit` wrote.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how a budget is best spent.

    \b
    moe-train plan compute-optimal --flops 5.76e23
    moe-train plan compute-optimal --gpu-hours 30000 --gpu h100 --mfu 0.192 --total-params 8.5B
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


@app.command(context_settings=OVERRIDES)
def memory(
    run: Run,
    overrides: Overrides = (),
    nodes: Nodes = None,
    nproc: Annotated[Optional[int], typer.Option(min=1, metavar="N", help="Ranks, instead of nodes.")] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="A preset or file of hardware; none: bytes alone.")] = "h100",
    as_json: AsJson = False,
) -> None:
    """Show the bytes of each rank, part by part.

    \b
    moe-train plan memory jetmoe_8b --nodes 12
    moe-train plan memory run.yaml --nproc 4 --gpu none parallel.tensor=2 training.recompute=full
    """
    from moe_train.plan.memory import memory as show

    show(run, overrides, nodes=nodes, nproc=nproc, gpu=gpu, as_json=as_json)


@app.command(context_settings=OVERRIDES)
def cost(
    run: Run,
    overrides: Overrides = (),
    nodes: Nodes = None,
    gpu: Gpu = "h100",
    price: Annotated[float, typer.Option(metavar="P", help="What one GPU costs for one hour.")] = 2.0,
    mfu: Annotated[Optional[float], typer.Option(metavar="PART", help="The part of the peak reached.")] = None,
    tokens_per_second: Annotated[
        Optional[float], typer.Option(metavar="T", help="Tokens per second of one GPU.")
    ] = None,
    metrics: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="metrics.jsonl measured on as many GPUs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run takes in days and money.

    \b
    moe-train plan cost jetmoe_8b --nodes 12 --price 2.0 --tokens-per-second 11574
    moe-train plan cost run.yaml --nodes 12 --metrics runs/trial/metrics.jsonl
    """
    from moe_train.plan.cost import cost as show

    show(
        run,
        overrides,
        nodes=nodes,
        gpu=gpu,
        price=price,
        mfu=mfu,
        tokens_per_second_per_gpu=tokens_per_second,
        metrics=metrics,
        as_json=as_json,
    )


@app.command()
def upcycle(
    dense_tokens: Annotated[
        str, typer.Option(metavar="N", help="Tokens the dense checkpoint has seen; 0: there is none.")
    ],
    moe_tokens: Annotated[str, typer.Option(metavar="N", help="Tokens the mixture of experts will see.")],
    cost_ratio: Annotated[
        float, typer.Option(metavar="R", help="Cost of a token of the mixture over one of the dense model.")
    ] = 2.0,
    learning_rate_ratio: Annotated[
        Optional[float], typer.Option(metavar="PART", help="The dense run's last learning rate over its peak.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether to reuse a dense checkpoint.

    \b
    moe-train plan upcycle --dense-tokens 2T --moe-tokens 500B
    """
    from moe_train.plan.upcycle import upcycle as show

    show(
        dense_tokens=dense_tokens,
        moe_tokens=moe_tokens,
        cost_ratio=cost_ratio,
        learning_rate_ratio=learning_rate_ratio,
        as_json=as_json,
    )


@app.command(context_settings=OVERRIDES)
def layout(
    run: Run,
    overrides: Overrides = (),
    nodes: Nodes = None,
    gpu: Gpu = "h100",
    calibrate: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="metrics.jsonl of this run file on these nodes.")
    ] = None,
    measured: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="A step measured on one GPU, by h100_step.py or `profile`.")
    ] = None,
    contestant: Annotated[
        Optional[str],
        typer.Option(metavar="NAME", help="Which of --measured, such as ours-fp8-tensorwise-share; else ours."),
    ] = None,
    routing: Annotated[
        Optional[str], typer.Option(metavar="learned|balanced", help="Which of --measured; else balanced.")
    ] = None,
    micro_batch: Annotated[
        Optional[list[int]], typer.Option(min=1, metavar="N", help="A micro-batch size to try; repeatable.")
    ] = None,
    best: Annotated[int, typer.Option(min=1, metavar="N", help="Layouts to show.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Rank every legal layout by expected speed.

    A key of the layout that you set (parallel.tensor=2, training.micro_batch_size=4, ...) stays as it is. With
    --calibrate it says how the measured run was laid out.

    \b
    moe-train plan layout jetmoe_8b --nodes 12 --gpu h100
    moe-train plan layout jetmoe_8b --nodes 12 parallel.pipeline=1 training.recompute=none
    moe-train plan layout run.yaml --nodes 2 --calibrate runs/trial/metrics.jsonl
    moe-train plan layout jetmoe_8b --nodes 12 --measured h100.json --contestant ours-share
    """
    from moe_train.plan.layouts import layout as show

    show(
        run,
        overrides,
        nodes=nodes,
        gpu=gpu,
        calibrate=calibrate,
        measured=measured,
        contestant=contestant,
        routing=routing,
        micro_batches=micro_batch or None,
        best=best,
        as_json=as_json,
    )


@app.command()
def fit(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="CSV files and run folders.")],
    out: Annotated[Optional[str], typer.Option(metavar="LAW.json", help="Write the laws here.")] = None,
    plot: Annotated[Optional[str], typer.Option(metavar="FILE.png", help="Draw the fit here.")] = None,
    bootstraps: Annotated[int, typer.Option(metavar="N", help="Resamplings for the intervals.")] = 100,
    starts: Annotated[int, typer.Option(metavar="N", help="How many of the grid's 4,500 starts to try.")] = 60,
    drop_highest: Annotated[int, typer.Option(metavar="N", help="Leave out the N runs of highest loss.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit scaling laws to runs of your own.

    \b
    moe-train plan fit runs/sweep/c*/ --out law.json --plot law.png
    moe-train plan fit points.csv --drop-highest 5
    """
    from moe_train.plan.fit import fit as show

    show(
        runs,
        out=out,
        plot=plot,
        bootstraps=bootstraps,
        starts=starts,
        drop_highest=drop_highest,
        as_json=as_json,
    )


@app.command()
def sweep(
    budgets: Annotated[list[str], typer.Argument(metavar="BUDGETS...", help="Operations of each run (6ND).")],
    base: Annotated[str, typer.Option(metavar="RUN.yaml", help="What the runs have in common.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder for the run files.")],
    sizes: Annotated[int, typer.Option(metavar="N", help="Model sizes for each budget.")] = 7,
    around: Annotated[
        Optional[str], typer.Option(metavar="N", help="Active parameters of the middle size; else by the law.")
    ] = None,
    sparsity: Annotated[
        Optional[list[float]], typer.Option(metavar="S", help="Also vary the sparsity; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the run files of a sweep.

    \b
    moe-train plan sweep 1e13 3e13 1e14 --base demo --out runs/sweep --around 1M
    moe-train plan sweep 1e14 --base demo --out runs/sparse --sparsity 0 --sparsity 0.5 --sparsity 0.75
    """
    from moe_train.plan.sweep import sweep as write

    write(budgets, base=base, out=out, sizes=sizes, around=around, sparsities=sparsity or None, as_json=as_json)
