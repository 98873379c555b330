"""``moe-train launch slurm``: check, render, validate, submit."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch import controller
from launch.checks import problems
from launch.job import Job, load_job
from launch.journal import Journal
from launch.script import render
from moe_train.errors import UserError
from moe_train.training.preflight import last_checkpoint_state
from moe_train.training.run_folder import RunFolder, now, write_atomically
from moe_train.units import format_time


def launch(
    run: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    time: str | None = None,
    chain: int = 1,
    spares: int = 0,
    dry_run: bool = False,
) -> None:
    """Submit the run of the file `run` to Slurm: `chain` jobs, one after another, with `spares` nodes more than it
    needs.

    With `dry_run` print the script alone, warn on stderr of what is not there, write nothing.

    Raises an error with ``exit_code`` 2, one line, for whatever would stop the run later.
    """
    job = load_job(run, overrides, nodes=nodes, time=time, chain=chain, spares=spares, strict=not dry_run)
    found = list(problems(job))
    if dry_run:
        for line in found:
            print(f"warning: {line}", file=sys.stderr)
        print(render(job), end="")
        return
    if found:
        for line in found[1:]:
            print(f"also: {line}", file=sys.stderr)
        raise UserError(found[0])
    script = render(job)
    when = controller.test_only(script)
    journal, folder, ids = Journal(job.run_dir), RunFolder(job.run_dir), []
    with journal.submitting():
        _refuse_second(journal)
        folder.logs.mkdir(exist_ok=True)  # Slurm does not make the folder of --output
        journal.clear()
        folder.clear_stop()  # one that is touched from here on counts, while the job waits as well
        write_atomically(job.script_path, script)
        for link in range(chain):
            ids.append(controller.submit(job.script_path))
            journal.submitted(_record(job, ids[-1], link + 1))
    _tell(job, ids, when)


def _refuse_second(journal: Journal) -> None:
    """One job (or chain) a folder: a second one would take the run away from the first."""
    live = [name for name, (state, _) in controller.states(journal.job_ids()).items() if state in controller.LIVE]
    pid = journal.launcher()
    if live or pid is not None:
        holder = f"job {', '.join(sorted(live))}" if live else f"process {pid}"
        raise UserError(
            f"{journal.run_dir} has {holder} already; watch it with moe-train launch status, "
            "or end it with moe-train launch cancel"
        )


def _record(job: Job, name: str, link: int) -> dict[str, object]:
    cluster = job.cluster
    return {
        "time": now(),
        "job": name,
        "link": link,
        "of": job.chain,
        "cluster": cluster.name,
        "nodes": job.nodes,
        "ranks": job.ranks,
        "seconds": job.seconds,
        "total_tokens": job.config.end(),
        "dollars_per_hour": None
        if cluster.dollars_per_gpu_hour is None
        else cluster.dollars_per_gpu_hour * (job.nodes + job.spares) * cluster.priced_units_per_node,
    }


def _tell(job: Job, ids: list[str], when: str) -> None:
    state = last_checkpoint_state(RunFolder(job.run_dir))
    place = f"goes on at step {state['step']}" if state else "starts from the beginning"
    jobs = f"job {ids[0]}" if len(ids) == 1 else f"jobs {', '.join(ids)}, one after another"
    print(
        f"submitted {jobs}: {job.nodes} nodes, {job.ranks} ranks, at most {format_time(job.seconds)}; the run {place}"
    )
    print(f"Slurm says: {when}")
    print(f"script    {job.script_path}")
    print(f"watch     moe-train launch status {job.run_dir}")
    print(f"read      moe-train launch logs {job.run_dir} --follow")
    print(f"end       moe-train launch cancel {job.run_dir}")
