"""``moe-train launch cancel``: save first, then end the jobs."""

from __future__ import annotations

import time

from launch import controller
from launch.journal import Journal
from moe_train.errors import HardwareError, UserError
from moe_train.training.run_folder import RunFolder

_POLL_SECONDS = 1.0


def cancel(run_dir: str, *, now: bool = False, timeout: float = 1800.0) -> None:
    """End the jobs of a run: those that wait at once, the one that runs once it has saved, or after `timeout` seconds.

    With `now` nothing is saved. A later `launch slurm` goes on from the last checkpoint.

    Raises UserError: there is nothing to cancel.
    """
    journal, folder = Journal(run_dir), RunFolder(run_dir)
    if not journal.jobs():
        raise UserError(f"{run_dir} was not submitted by moe-train launch; touch {folder.stop_path} to have a run save and stop")
    live = _live(journal)
    if not live:
        print(f"no job of {run_dir} is waiting or running")
        return
    journal.cancel_path.touch()  # the batch script starts nothing again from here on
    running = [job for job, state in live.items() if state in ("RUNNING", "SUSPENDED", "STOPPED")]
    waiting = [job for job in live if job not in running]
    controller.cancel([*waiting, *running] if now else waiting)
    if now or not running:
        print(f"cancelled job {', '.join([*waiting, *running])}")
        return
    print(f"job {', '.join(running)}: asked to save", flush=True)
    deadline = time.monotonic() + timeout
    while (left := [job for job in _live(journal) if job in running]) and journal.over() is None:
        if time.monotonic() > deadline:
            controller.cancel(left)
            raise HardwareError(f"job {', '.join(left)} did not save within {timeout:.0f} s: cancelled; the last checkpoint stays")
        folder.stop_path.touch()  # again and again: a run that was still starting clears it
        time.sleep(_POLL_SECONDS)
    outcome = folder.read_outcome()
    print(f"ended at step {outcome.get('step')}: {outcome.get('reason')}; moe-train launch slurm goes on from there")


def _live(journal: Journal) -> dict[str, str]:
    found = controller.states(journal.job_ids())
    return {job: state for job, (state, _) in found.items() if state in controller.LIVE}
