"""A deadline for each step: a run that hangs must end, with every thread's stack on record, so that it can be started
again."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.rank import report_failure

EXIT_HANG = 5
STACKS_AFTER, KILL_AFTER = 2.0, 5.0
"""Seconds past the deadline at which the second line of defence writes the stacks, and ends the process."""


class Watchdog:
    """Ends the process with status 5 when it is not fed in time; says so in one line on stderr, or to the parent of the
    ranks.

    Args:
        timeout: seconds that a step may take.
        log_path: where the stacks go (appended); usually the log of this rank.
        before_exit: called with the message before the end (to leave an outcome behind). Keep it short.

    Two lines of defence. A thread writes the stacks and exits; it needs the interpreter lock. Where the main thread
    hangs inside C code that holds it, faulthandler's own thread (C, no lock) writes the stacks `STACKS_AFTER` the
    deadline, and the kernel's timer ends the process with SIGALRM `KILL_AFTER` it.

        watchdog = Watchdog(600, folder.logs / "rank_00000.log")
        watchdog.arm("step 1")
        for step in ...:
            ...
            watchdog.feed(f"step {step + 1}")
        watchdog.disarm()
    """

    def __init__(self, timeout: float, log_path: Path | str, before_exit: Callable[[str], None] | None = None):
        self.timeout = timeout
        self.before_exit = before_exit
        self.log_path = Path(log_path)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(self.log_path, "a", encoding="utf-8")
        self._condition = threading.Condition()
        self._deadline: float | None = None
        self._allowed = timeout
        self._what = ""
        self._thread: threading.Thread | None = None

    def arm(self, what: str = "", timeout: float | None = None) -> None:
        """Start, or start again, the time for `what`; `timeout` for this one alone (a first step compiles, a load
        reads)."""
        allowed = self.timeout if timeout is None else timeout
        with self._condition:
            self._what, self._allowed = what, allowed
            self._deadline = time.monotonic() + allowed
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
            self._condition.notify()
        faulthandler.dump_traceback_later(allowed + STACKS_AFTER, file=self._log)
        signal.setitimer(signal.ITIMER_REAL, allowed + KILL_AFTER)

    def feed(self, what: str = "") -> None:
        """A step is done, `what` is next: the time starts again."""
        self.arm(what)

    def disarm(self) -> None:
        """No deadline until the next `arm`."""
        with self._condition:
            self._deadline = None
            self._condition.notify()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    @contextmanager
    def allow(self, seconds: float, what: str) -> Iterator[None]:
        """Another limit for something that is not a step (a save, a validation); the step's time starts again after
        it."""
        self.arm(what, seconds)
        try:
            yield
        finally:
            self.arm()

    def _watch(self) -> None:
        with self._condition:
            while True:
                if self._deadline is None:
                    self._condition.wait()
                    continue
                left = self._deadline - time.monotonic()
                if left > 0:
                    self._condition.wait(left)
                    continue
                self._expire()

    def _expire(self) -> None:
        during = f" during {self._what}" if self._what else ""
        message = f"no progress for {self._allowed:g} s{during}: a hang; stacks of all threads are in {self.log_path}"
        try:
            self._log.write(f"\n{message}\n")
            self._log.flush()
            faulthandler.dump_traceback(file=self._log, all_threads=True)
            os.fsync(self._log.fileno())
            report_failure(EXIT_HANG, message)
            if self.before_exit is not None:
                self.before_exit(message)
        finally:
            os._exit(EXIT_HANG)
