"""``moe-train launch cancel``: save first, then end the jobs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from launch import controller
from launch.journal import Journal
from moe_train.errors import HardwareError, StoppedError, UserError
from moe_train.training.fence import owner_of
from moe_train.training.run_folder import RunFolder
from parallel.spawn import REPEAT_SECONDS

_POLL_SECONDS = 1.0


def cancel(run_dir: str, *, now: bool = False, timeout: float = 1800.0) -> None:
    """End the jobs of a run: those that wait at once, the one that runs once it has saved, or after `timeout` seconds.

    With `now` nothing is saved. A later `launch slurm` goes on from the last checkpoint.

    Raises UserError: there is nothing to cancel.
    """
    journal, folder = Journal(run_dir), RunFolder(run_dir)
    if not journal.jobs():
        raise UserError(
            f"{run_dir} was not submitted by moe-train launch; touch {folder.stop_path} to have a run save and stop"
        )
    live = _live(journal)
    if not live and journal.launcher() is not None:
        _end_launcher(journal, folder, now, timeout)
        return
    if not live:
        print(f"no job of {run_dir} is waiting or running")
        owner = owner_of(folder.path)
        if owner and owner.may_be_alive() and not folder.read_outcome().get("ended"):  # its launcher was killed
            print(f"{owner.describe()} may still be at work; touch {folder.stop_path} has it save and end")
        return
    journal.cancel_path.touch()  # the batch script starts nothing again from here on
    running = [job for job, state in live.items() if state in ("RUNNING", "SUSPENDED", "STOPPED")]
    waiting = [job for job in live if job not in running]
    controller.cancel([*waiting, *running] if now else waiting)
    if now or not running:
        journal.finish(StoppedError.exit_code, "cancelled")
        print(f"cancelled job {', '.join([*waiting, *running])}")
        return
    print(f"job {', '.join(running)}: asked to save", flush=True)
    if not _ends(journal, folder, lambda: any(job in running for job in _live(journal)), timeout):
        left = [job for job in _live(journal) if job in running]
        controller.cancel(left)
        raise HardwareError(
            f"job {', '.join(left)} did not save within {timeout:.0f} s: cancelled; the last checkpoint stays"
        )
    _tell(folder, "moe-train launch slurm")


def _end_launcher(journal: Journal, folder: RunFolder, now: bool, timeout: float) -> None:
    """End a run that a process of this machine starts again and again."""
    pid = journal.launcher()
    journal.cancel_path.touch()
    print(f"process {pid}: asked to {'end' if now else 'save'}", flush=True)
    if now:
        for _ in range(2):  # the second signal ends without saving
            os.kill(pid, signal.SIGTERM)
            time.sleep(2 * REPEAT_SECONDS)
    if not _ends(journal, folder, lambda: journal.launcher() is not None, timeout):
        raise HardwareError(f"process {pid} did not save within {timeout:.0f} s: it goes on; --now ends it")
    _tell(folder, "moe-train launch local (or hostfile)")


def _ends(journal: Journal, folder: RunFolder, running: Callable[[], bool], timeout: float) -> bool:
    """Ask the run to save until it is over; False where that takes longer than `timeout`."""
    deadline = time.monotonic() + timeout
    while journal.over() is None and running():
        if time.monotonic() > deadline:
            return False
        folder.stop_path.touch()  # again and again: a run that was about to start has cleared it
        time.sleep(_POLL_SECONDS)
    return True


def _tell(folder: RunFolder, command: str) -> None:
    outcome = folder.read_outcome()
    print(f"ended at step {outcome.get('step')}: {outcome.get('reason')}; {command} goes on from there")


def _live(journal: Journal) -> dict[str, str]:
    found = controller.states(journal.job_ids())
    return {job: state for job, (state, _) in found.items() if state in controller.LIVE}
