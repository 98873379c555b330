"""``moe-train launch local``: a run on this machine, started again after failures."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

from launch.hosts import THIS, Host, check_hosts
from launch.supervise import Supervisor
from moe_train.config import load_run
from parallel.spawn import local_gpus


class Local:
    """One start: `moe-train pretrain` as a process of this machine."""

    def __init__(self, command: Sequence[str]):
        # In a session of its own: Ctrl-C would reach it twice, and the second signal ends without saving.
        self._process = subprocess.Popen(command, start_new_session=True)

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.Signals(number))


def launch(
    run: str, overrides: Sequence[str] = (), *, nproc: int | None = None, max_restarts: int | None = None
) -> int:
    """Train on `nproc` processes of this machine until the run is over; its exit status.

    Raises PolicyStop after more than `max_restarts` failures (default: the cluster file's) without a new checkpoint.
    """
    config = load_run(run, overrides)
    supervisor = Supervisor(config, max_restarts, "local")
    command = [sys.executable, "-m", "moe_train", "pretrain", run, *overrides]
    command += ["--nproc", str(nproc)] if nproc else []

    def start(restart: int) -> Local:
        if supervisor.cluster and supervisor.cluster.preflight:
            check_hosts([Host(THIS, nproc or local_gpus() or 1)], 1, supervisor, restart)
        return Local(command)

    return supervisor.run(start)
