"""``moe-train launch local``: a run on this machine, started again after failures by the rules of the batch script."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launch.cluster import load_cluster
from launch.journal import Journal
from moe_train.checkpoint.folder import POINTER
from moe_train.config import load_run
from moe_train.errors import PolicyStop
from moe_train.training.run_folder import RunFolder, now

DEFAULT_RESTARTS = 3
_FINAL = (0, 2, 3, 6)
"""Complete, a user's mistake, stopped as asked, stopped by policy: not started again."""


def launch(run: str, overrides: Sequence[str] = (), *, nproc: int | None = None, max_restarts: int | None = None) -> int:
    """Train on `nproc` processes of this machine until the run is over; its exit status.

    What a start was worth is decided by outcome.json, and by the exit status where there is none.

    Raises PolicyStop after more than `max_restarts` failures (default: the cluster file's) without a new checkpoint.
    """
    config = load_run(run, overrides)
    if max_restarts is None:
        max_restarts = load_cluster(config.launch.cluster).max_restarts if config.launch.cluster else DEFAULT_RESTARTS
    folder, journal = RunFolder(config.output_dir), Journal(config.output_dir)
    command = [sys.executable, "-m", "moe_train", "pretrain", run, *overrides]
    command += ["--nproc", str(nproc)] if nproc else []
    restart, failures, stuck_at = 0, 0, -1
    while True:
        since, saved = now(), saved_step(folder)
        status = _run(command, journal, restart, saved)
        outcome = _outcome(folder, since, status)
        code, reason, saved = outcome["code"], outcome["reason"], saved_step(folder)
        final = code in _FINAL
        failures = failures + 1 if saved == stuck_at else 1
        stuck_at = saved
        last = final or failures > max_restarts
        journal.note("end", restart=restart, code=code, reason=reason, next="over" if last else "start", saved=saved)
        if final:
            return code
        if last:
            raise PolicyStop(f"crash loop: {failures} failures at step {saved}, the last with status {code}: {reason}")
        restart += 1
        print(f"ended with status {code} ({reason}); restart {restart}, from step {saved}", file=sys.stderr, flush=True)


def saved_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    try:
        return int((folder.checkpoints / POINTER).read_text())
    except (OSError, ValueError):
        return 0


def _run(command: list[str], journal: Journal, restart: int, saved: int) -> int:
    """One start, to its end; signals are handed on to it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def hand_on(number: int, _frame: Any) -> None:
        if process is None:
            early.append(number)
        elif process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        # In a session of its own: Ctrl-C would reach it twice, and the second signal ends without saving.
        process = subprocess.Popen(command, start_new_session=True)
        for number in early:
            process.send_signal(number)
        journal.note("start", restart=restart, saved=saved)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(folder: RunFolder, since: str, status: int) -> dict[str, Any]:
    """What the run wrote, else what its process ended with (a mistake in a file is told before there is a folder)."""
    if folder.ended_since(since):
        return folder.read_outcome()
    return {"code": status, "reason": f"ended with status {status}, without an outcome"}
