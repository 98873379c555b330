"""Requests to stop: SIGTERM, SIGINT, SIGUSR1, SIGHUP (a lost terminal), a file, a time limit.

The loop asks after each step, the ranks agree, save, and end with status 3.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_train.units import format_time
from parallel.rank import ERROR_DIR, EXIT_STOPPED, STOP_SIGNALS, report_failure

REPEAT_SECONDS = 1.0
"""A second signal within this time is the first one again: `timeout` and job managers signal a process and then its
group."""


class StopRequest:
    """Whether this process was asked to stop, and why. A context manager: handlers are in place inside it.

    Args:
        stop_file: a file whose existence is a request; give it on one rank only, the ranks agree on the answer.
        max_wall_time: seconds after `started` at which the run stops by itself.
        started: `time.monotonic()` of the start; default: when this object is made.
        before_exit: called before a signal ends the process at once (to leave an outcome behind). Keep it short.
        loading: whether `begin` will be called.
        on_signal: called with the name of the first signal that asks for a save (to record it). Keep it short.

    With `loading` there is nothing to save until `begin`: the first signal ends the process at once with status 3. Else
    a second one does, other than SIGUSR1. Both also when the main thread waits in a collective that will never end:
    Python runs handlers in the main thread alone, so a thread of its own listens to the interpreter's wake-up
    descriptor. Signals can be caught from the main thread only.
    """

    def __init__(
        self,
        stop_file: Path | None = None,
        max_wall_time: float | None = None,
        started: float | None = None,
        before_exit: Callable[[str], None] | None = None,
        loading: bool = False,
        on_signal: Callable[[str], None] | None = None,
    ):
        self.stop_file = stop_file
        self.max_wall_time = max_wall_time
        self.started = time.monotonic() if started is None else started
        self.before_exit = before_exit
        self.on_signal = on_signal
        self._loading, self._told = loading, False
        self._signal: int | None = None
        self._reason: str | None = None
        self._first_stop: float | None = None
        self._handlers: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def reason(self) -> str | None:
        """Why this process should stop, or None. Of this process alone: the ranks must agree before they act on it, and
        by then the file may be gone, so the first reason stays."""
        if self._reason is None:
            self._reason = self._find_reason()
        return self._reason

    def _find_reason(self) -> str | None:
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        if self.stop_file is not None and self.stop_file.exists():
            return f"file {self.stop_file.name}"
        if self.max_wall_time is not None and time.monotonic() - self.started >= self.max_wall_time:
            return f"max_wall_time {format_time(self.max_wall_time)}"
        return None

    def begin(self) -> None:
        """From now on there is something to save: a signal asks for a stop after the step."""
        self._loading = False

    def install(self) -> None:
        """Catch the signals from now on."""
        reader, writer = self._sockets = socket.socketpair()
        writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)
        self._listener = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        self._listener.start()

    def restore(self) -> None:
        """Put back the handlers that were there before `install`."""
        if self._sockets is None:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        reader, writer = self._sockets
        self._sockets = None
        writer.close()  # ends the listening thread, which closes the other end
        # `on_signal` may hold the last reference to tensors; freed by a thread while the interpreter ends, they abort
        # the process.
        self._listener.join()

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restore()

    def _note(self, number: int, _frame: Any) -> None:
        if self._signal is None:
            self._signal = number

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while data := reader.recv(64):
                for number in data:
                    self._count(number)

    def _count(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        name = signal.Signals(number).name
        if self._loading:
            self._exit_now(f"stopped by {name} before the first step, with nothing to save")
        self._note(number, None)
        if self.on_signal is not None and not self._told:
            self._told = True
            self.on_signal(name)
        if number == signal.SIGUSR1:
            return
        if self._first_stop is None:
            self._first_stop = time.monotonic()
        elif time.monotonic() - self._first_stop > REPEAT_SECONDS:
            self._exit_now(f"second signal {name}: ended without saving")

    def _exit_now(self, reason: str) -> None:
        try:
            with suppress(OSError):  # the terminal may have gone
                if ERROR_DIR in os.environ:
                    # Without a word its parent takes it for a rank that saved, and the others wait for it.
                    report_failure(EXIT_STOPPED, reason)
                else:
                    os.write(2, f"\n{reason}\n".encode())
                if os.isatty(2):
                    os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
            if self.before_exit is not None:
                self.before_exit(reason)
        finally:
            os._exit(EXIT_STOPPED)
