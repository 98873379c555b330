"""A run that this process starts, and starts again after failures, by the rules of the batch script."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from launch.alerts import tell
from launch.cluster import ClusterConfig, load_cluster
from launch.journal import Journal
from moe_train.checkpoint.folder import POINTER
from moe_train.config import RunConfig
from moe_train.errors import HardwareError, PolicyStop, StoppedError, UserError
from moe_train.training.fence import born
from moe_train.training.run_folder import RunFolder, now
from parallel.rank import STOP_SIGNALS

DEFAULT_RESTARTS = 3
_FINAL = (0, 2, 3, 6)
"""Complete, a user's mistake, stopped as asked, stopped by policy: not started again."""
_POLL_SECONDS = 0.2


class RunFolderProblem(HardwareError):
    """The run's folder is full or takes no files, wherever one looks from: another start would find the same."""


class Start(Protocol):
    """The processes of one start."""

    def poll(self) -> int | None:
        """Their exit status once all have ended."""

    def stop(self, number: int) -> None:
        """Hand a signal on to them."""


class Supervisor:
    """Starts a run until it is over. What a start was worth is decided by outcome.json, and by the exit status where
    there is none.

    Args:
        config: the run.
        max_restarts: restarts after failures without a new checkpoint between them; None: the cluster file's.
        launch: what starts the run, for `launch status`: ``local`` or ``hostfile``.
        hosts: how many are paid for.
    """

    def __init__(self, config: RunConfig, max_restarts: int | None, launch: str, hosts: int = 1):
        self.cluster: ClusterConfig | None = load_cluster(config.launch.cluster) if config.launch.cluster else None
        if max_restarts is None:
            max_restarts = self.cluster.max_restarts if self.cluster else DEFAULT_RESTARTS
        self.max_restarts, self.launch, self.hosts = max_restarts, launch, hosts
        self.config, self.folder, self.journal = config, RunFolder(config.output_dir), Journal(config.output_dir)
        self.where = socket.gethostname()
        """The hosts of the present start, for `launch status`."""
        self._asked: list[int] = []
        self._running: Start | None = None
        self._hopeless = False

    def run(self, start: Callable[[int], Start]) -> int:
        """Call `start(restart)` until the run is over; the exit status of the run. After a signal nothing is started
        again.

        Raises:
            PolicyStop: more than `max_restarts` failures without a new checkpoint.
            UserError: another launcher has the run.
        """
        with self.journal.submitting():
            if (other := self.journal.launcher()) is not None:
                raise UserError(
                    f"{self.folder.path} is run by process {other} already; end it with moe-train launch cancel "
                    f"{self.folder.path}"
                )
            self._submit()
        with _signals(self._hand_on):
            return self._starts(start)

    def _starts(self, start: Callable[[int], Start]) -> int:
        restart, failures, stuck_at = 0, 0, -1
        while True:
            since, saved = now(), self.saved_step()
            status = self._once(start, restart, saved)
            outcome = self._outcome(since, status)
            code, reason, saved = outcome["code"], outcome["reason"], self.saved_step()
            cancelled = self.journal.cancel_path.exists() and code != 0
            if cancelled:
                code, reason = 3, "cancelled"
            final = code in _FINAL or self._hopeless
            if self._asked and not final:  # it was killed before it could catch the signal, or failed while it saved
                code, reason, final = 3, f"signal {signal.Signals(self._asked[0]).name}; {reason}", True
            failures = failures + 1 if saved == stuck_at else 1
            stuck_at = saved
            if final:
                return self._end(restart, code, reason)
            if failures > self.max_restarts:
                loop = f"crash loop: {failures} failures at step {saved}, the last with status {code}: {reason}"
                self._end(restart, PolicyStop.exit_code, loop)
                raise PolicyStop(loop)
            self._note_end(restart, code, reason, "start")
            restart += 1
            self._tell(f"ended with status {code} ({reason}); restart {restart}, from step {saved}")

    def saved_step(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        try:
            return int((self.folder.checkpoints / POINTER).read_text())
        except (OSError, ValueError):
            return 0

    def _once(self, start: Callable[[int], Start], restart: int, saved: int) -> int:
        """One start, to its end."""
        began = now()
        try:
            running = self._running = start(restart)
        except HardwareError as error:  # no node is fit, or none can be reached
            self._hopeless = isinstance(error, RunFolderProblem)
            self.folder.settle(error.exit_code, str(error), now())
            return error.exit_code
        finally:  # which hosts it has is known only now
            self.journal.note("start", time=began, restart=restart, saved=saved, nodes=self.where)
        for number in self._asked:  # before there was anybody to hand them on to
            running.stop(number)
        stall = Stall(self.folder.metrics_path, self.config.faults.step_timeout / 2)
        wanted = False
        while (status := running.poll()) is None:
            wanted = wanted or self.journal.cancel_path.exists() or self.folder.stop_requested()
            if wanted:  # again and again: a run that was about to start has cleared it
                self.folder.stop_path.touch()
            if said := stall.look():
                self._tell(said)
            time.sleep(_POLL_SECONDS)
        self._running = None
        return status

    def _hand_on(self, number: int, _frame: Any) -> None:
        self._asked.append(number)
        if self._running is not None:
            self._running.stop(number)

    def _submit(self) -> None:
        """Note that this process has the run from now on."""
        self.journal.clear()
        self.folder.clear_stop()  # one that is touched from here on counts
        hourly = None
        if self.cluster and self.cluster.dollars_per_gpu_hour is not None:
            hourly = self.cluster.dollars_per_gpu_hour * self.cluster.priced_units_per_node * self.hosts
        process = {"launch": self.launch, "host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid())}
        record = {"time": now(), "job": None, **process, "nodes": self.hosts, "total_tokens": self.config.end()}
        self.journal.submitted({**record, "dollars_per_hour": hourly})

    def _note_end(self, restart: int, code: int, reason: str, following: str) -> None:
        self.journal.note("end", restart=restart, code=code, reason=reason, next=following, saved=self.saved_step())

    def _end(self, restart: int, code: int, reason: str) -> int:
        self._note_end(restart, code, reason, "over")
        self.journal.finish(code, reason)
        self._tell(f"the run is over, status {code}: {reason}")
        return code

    def _tell(self, message: str) -> None:
        tell(f"{self.folder.path.name}: {message}", self.cluster)

    def _outcome(self, since: str, status: int) -> dict[str, Any]:
        """What the run wrote, else what its process ended with (a mistake in a file is told before there is a
        folder)."""
        if self.folder.ended_since(since):
            outcome = self.folder.read_outcome()
            lost = outcome["code"] == StoppedError.exit_code and status not in (0, StoppedError.exit_code)
            if lost and not self.folder.stop_requested():  # cut off from here, a host has its ranks save
                return {"code": HardwareError.exit_code, "reason": f"a host was lost; {outcome['reason']}"}
            return outcome
        if status == 0:  # the run was complete before, and a start of such a one writes nothing
            return {"code": 0, "reason": "complete"}
        return {"code": status, "reason": f"ended with status {status}, without an outcome"}


class Stall:
    """Whether a start has stopped to make steps, and makes them again.

    Args:
        metrics: the file that gets a line a step.
        seconds: without a line after which it stalls; four times that before the first one, which comes after
            everything is loaded.
    """

    def __init__(self, metrics: Path, seconds: float):
        self.metrics, self.seconds, self.stalled, self._began = metrics, seconds, False, time.time()

    def look(self) -> str | None:
        """A line for people when that has changed."""
        last = self.metrics.stat().st_mtime if self.metrics.exists() else 0.0
        loading = last < self._began
        quiet = time.time() - max(last, self._began)
        stalled = quiet > self.seconds * (4 if loading else 1)
        if stalled == self.stalled:
            return None
        self.stalled = stalled
        return f"stalls: no step for {quiet:.0f} s" if stalled else "recovered: it makes steps again"


@contextmanager
def _signals(handler: Callable[[int, Any], None]):
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
