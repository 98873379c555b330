"""The verbs of `moe-train launch`. No logic here: a verb imports one function and calls it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from moe_train.overrides import OVERRIDES, Overrides

app = typer.Typer(
    help="Start a run on a cluster, and look after it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RunFile = Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run file, or the name of a preset.")]
RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run's folder.")]


@app.command("slurm", context_settings=OVERRIDES)
def slurm(
    run: RunFile,
    overrides: Overrides = (),
    nodes: Annotated[Optional[int], typer.Option(min=1, metavar="N", help="Nodes, instead of launch.nodes.")] = None,
    time: Annotated[Optional[str], typer.Option(metavar="T", help="Time limit, such as 12h or 2-00:00:00.")] = None,
    chain: Annotated[
        int, typer.Option(min=1, metavar="N", help="Jobs in a row; each goes on where the last stopped.")
    ] = 1,
    spares: Annotated[int, typer.Option(min=0, metavar="N", help="Spare nodes, to take the place of unfit ones.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
) -> None:
    """Check a run and submit it to Slurm.

    It requeues itself until it is complete.

    \b
    moe-train launch slurm run.yaml launch.cluster=my_cluster.yaml --nodes 12 --time 2d
    moe-train launch slurm run.yaml --dry-run
    moe-train launch slurm run.yaml --time 1d --chain 7
    """
    from launch.slurm import launch

    launch(run, overrides, nodes=nodes, time=time, chain=chain, spares=spares, dry_run=dry_run)


@app.command("local", context_settings=OVERRIDES)
def local(
    run: RunFile,
    overrides: Overrides = (),
    nproc: Annotated[
        Optional[int], typer.Option("--nproc", min=1, metavar="N", help="Processes; else one a GPU, or one.")
    ] = None,
    max_restarts: Annotated[
        Optional[int],
        typer.Option(min=0, metavar="K", help="Restarts after failures without a new checkpoint between them."),
    ] = None,
) -> Optional[int]:
    """Train on this machine, and start again after failures.

    \b
    moe-train launch local configs/run/demo.yaml --nproc 2
    """
    from launch.local import launch

    return launch(run, overrides, nproc=nproc, max_restarts=max_restarts)


@app.command("hostfile", context_settings=OVERRIDES)
def hostfile(
    hosts: Annotated[str, typer.Argument(metavar="HOSTFILE", help="Machines, a line each: name slots=8.")],
    run: RunFile,
    overrides: Overrides = (),
    nodes: Annotated[
        Optional[int], typer.Option(min=1, metavar="N", help="Machines to use; the others are spare ones.")
    ] = None,
    nproc: Annotated[
        Optional[int], typer.Option("--nproc", min=1, metavar="N", help="Processes on each, instead of slots.")
    ] = None,
    rsh: Annotated[
        str, typer.Option(metavar="COMMAND", help="Runs a command line on a host, and hands stdin on.")
    ] = "ssh",
    max_restarts: Annotated[
        Optional[int],
        typer.Option(min=0, metavar="K", help="Restarts after failures without a new checkpoint between them."),
    ] = None,
) -> Optional[int]:
    """Train on the machines of a hostfile.

    Starts again after failures. The machines share a disk, see this folder under the same path, and let you in
    without a password.

    \b
    moe-train launch hostfile hosts.txt run.yaml
    moe-train launch hostfile hosts.txt run.yaml --nodes 12 --rsh "ssh -p 2222"
    """
    from launch.hostfile import launch

    return launch(hosts, run, overrides, nodes=nodes, nproc=nproc, rsh=rsh, max_restarts=max_restarts)


@app.command("status")
def status(
    run_dir: RunDir,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until the run is over.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, in plain units.")] = False,
) -> None:
    """Show state, progress, speed and restarts.

    Also the reasons for restarts, the expected end and the cost. The run's folder is enough, even when Slurm has
    forgotten the job.

    \b
    moe-train launch status runs/jetmoe_8b --watch
    """
    from launch.status import status as show

    show(run_dir, as_json=as_json, watch=watch)


@app.command("logs")
def logs(
    run_dir: RunDir,
    rank: Annotated[
        Optional[int], typer.Option(min=0, metavar="R", help="The log of this rank; else the job's.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run is over.")] = False,
    tail: Annotated[int, typer.Option(min=0, metavar="N", help="How many of the last lines to show; 0: all.")] = 100,
) -> None:
    """Show the log of a run.

    \b
    moe-train launch logs runs/jetmoe_8b --follow
    moe-train launch logs runs/jetmoe_8b --rank 17
    """
    from launch.logs import logs as show

    show(run_dir, rank=rank, follow=follow, tail=tail)


@app.command("cancel")
def cancel(
    run_dir: RunDir,
    now: Annotated[bool, typer.Option("--now", help="End at once, without saving.")] = False,
) -> None:
    """Have a run save, then end its jobs.

    \b
    moe-train launch cancel runs/jetmoe_8b
    """
    from launch.cancel import cancel as end

    end(run_dir, now=now)
