"""The commands of Slurm that the launcher uses, with their errors in one line. Nothing else here starts one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from moe_train.errors import HardwareError, UserError

TIMEOUT_SECONDS = 60
LIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
)
"""States of a job that has not ended for good, by squeue's manual."""


def available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def test_only(script: str) -> str:
    """Have the controller say whether `script` could run; returns its answer (when, and on which nodes).

    Raises UserError with the controller's own reason.
    """
    done = _call(["sbatch", "--test-only"], script)
    said = _said(done.stderr)
    if done.returncode:
        raise UserError(
            f"Slurm refuses the job: {said}; correct the cluster file, --nodes or --time (sinfo shows what there is)"
        )
    return said


def submit(script: Path) -> str:
    """Submit a script file and return the job's id.

    Raises UserError with the controller's own reason.
    """
    done = _call(["sbatch", "--parsable", str(script)])
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {_said(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def states(jobs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(state, node list or reason) of those of `jobs` that Slurm still knows; empty where it does not answer."""
    wanted = set(jobs)
    if not wanted or not available():
        return {}
    # All own jobs in one question: squeue fails for a list that has one id which it has forgotten.
    try:
        done = _call(["squeue", "--me", "--noheader", "--states=all", "--format=%A|%T|%R"])
    except HardwareError:
        return {}
    rows = (line.split("|", 2) for line in done.stdout.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3 and row[0] in wanted}


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs at once."""
    jobs = list(jobs)
    if jobs:
        _call(["scancel", *jobs])


def _call(command: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    if not shutil.which(command[0]):
        raise UserError(f"there is no {command[0]} on this machine; run this where Slurm is, or see --dry-run")
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise HardwareError(f"{command[0]} does not answer within {TIMEOUT_SECONDS} s: is the controller up?") from None


def _said(text: str) -> str:
    lines = [line.split(": ", 1)[-1].removeprefix("error: ") for line in text.splitlines() if line.strip()]
    return "; ".join(lines)
