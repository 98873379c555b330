"""Start N ranks on this machine and answer for them with one status. Imports no torch.

torchrun turns every failure into status 1 and leaves its workers alive when it is killed. Here each rank is a fresh
interpreter that dies with this process; the first error of any rank is the one that is shown, and its code is what
comes back; signals are passed on, so that the ranks can save.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from parallel.errors import say
from parallel.rank import (
    ERROR_DIR,
    EXIT_LOST_RANK,
    EXIT_STOPPED,
    STACKS_SIGNAL,
    STOP_SIGNALS,
    rank_log_path,
    run_rank,
)
from parallel.rank_env import RankEnv, free_port, rank_environment

__all__ = [
    "RankEnv",
    "SpawnResult",
    "local_gpus",
    "rank_environment",
    "rank_log_path",
    "run_rank",
    "run_ranks",
    "spawn_ranks",
    "tell",
]

SETTLE_SECONDS = 1.0
"""After the first failure the others may fail by themselves, so that the cause is known, not only its echo."""
GRACE_SECONDS = 5.0
"""From SIGTERM to SIGKILL for ranks that outlive another rank's failure."""
REPEAT_SECONDS = 1.0
"""A second signal within this time is the first one again: `timeout` signals its child and then its group."""

_POLL_SECONDS = 0.05
_SIGNAL_HINTS = {
    signal.SIGKILL: " (the kernel does that when memory runs out)",
    signal.SIGALRM: " (the last resort of a watchdog: it hung)",
}
# The child's modules are the parent's: its sys.path is handed on, and the working directory shadows nothing.
_BOOT = "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from parallel.rank import main; main()"


@dataclass(frozen=True)
class SpawnResult:
    """How the ranks ended."""

    code: int
    """0; 3 when they stopped as asked; else the exit status of the first failure."""
    message: str
    """One line: what became of the first failing rank; empty for 0 and for ranks that returned 3."""
    rank: int | None = None
    """The rank that failed first."""
    traceback: str | None = None
    """Of a bug only."""


@dataclass
class _Failure:
    rank: int
    code: int
    message: str
    time: float
    consequence: bool
    traceback: str | None = None


def run_ranks(nproc: int, target: str, args: list | dict, log_dir: Path | str | None = None) -> int:
    """Run `target` on `nproc` ranks, print the first failure on stderr, and return the status (see `spawn_ranks`)."""
    result = spawn_ranks(nproc, target, args, log_dir)
    tell(result, log_dir)
    return result.code


def tell(result: SpawnResult, log_dir: Path | str | None = None) -> None:
    """Print the first failure of a group of ranks, if there was one, on stderr."""
    if result.traceback:
        say(result.traceback.rstrip("\n"))
    if result.message:
        say(result.message if result.code == EXIT_STOPPED else f"error: {result.message}")
        if result.code != 2 and result.rank is not None and log_dir is not None:
            say(f"the log of rank {result.rank}: {rank_log_path(log_dir, result.rank)}")


def spawn_ranks(
    nproc: int, target: str, args: list | dict, log_dir: Path | str | None = None, first: RankEnv | None = None
) -> SpawnResult:
    """Start `nproc` fresh interpreters that each call `target(*args)` (a dict: `**args`) and wait for them.

    Args:
        target: `package.module:function`, importable here; it returns None or an int status.
        args: what JSON can carry.
        log_dir: gets `rank_00001.log` and so on; rank 0 keeps this terminal.
        first: the place of the first of them in a world that other machines have the rest of; None: these are all.

    Each rank has torch's `env://` variables (without `first` for a rendezvous on 127.0.0.1), no stdin, and a share of
    the cores in `OMP_NUM_THREADS` unless that is set. SIGINT, SIGTERM and SIGUSR1 are passed on; a second SIGINT or
    SIGTERM kills the ranks. Call it from the main thread: signals are passed on from there alone, and the ranks die
    with the thread that started them.

    Raises:
        ValueError: `nproc` < 1.
    """
    if nproc < 1:
        raise ValueError(f"nproc must be at least 1, not {nproc}")
    received: list[tuple[int, float]] = []
    before = _catch_signals(received)
    try:
        with tempfile.TemporaryDirectory(prefix="ranks-") as error_dir:
            group = _Group(nproc, target, args, log_dir, Path(error_dir), received, first)
            return group.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Group:
    """The ranks as seen from their parent."""

    def __init__(
        self,
        nproc: int,
        target: str,
        args: list | dict,
        log_dir: Path | str | None,
        error_dir: Path,
        received: list[tuple[int, float]],
        first: RankEnv | None,
    ):
        self.error_dir = error_dir
        self.log_dir = log_dir
        self.received = received  # signals, filled by the handlers
        self.forwarded: set[int] = set()
        self.ended: dict[int, float] = {}  # rank -> when it was seen to have ended
        self.stopped_at: float | None = None  # when the others were told to end
        payload = {"target": target, "args": args, "log_dir": None if log_dir is None else str(log_dir)}
        path = "\n".join(entry or os.getcwd() for entry in _import_path())
        command = [sys.executable, "-c", _BOOT, path, str(os.getpid()), json.dumps(payload)]
        first = first or RankEnv(0, nproc, 0, nproc, "127.0.0.1", free_port(), "env")
        self.processes: dict[int, subprocess.Popen] = {}  # by rank
        try:
            for local in range(nproc):
                rank, env = first.rank + local, dict(os.environ)
                env.update(replace(first, rank=rank, local_rank=local).variables())
                env[ERROR_DIR] = str(error_dir)
                env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
                # A session of its own: Ctrl-C reaches a rank once, through us, not twice.
                self.processes[rank] = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, start_new_session=True
                )
        except BaseException:
            self._kill()
            raise

    def wait(self) -> SpawnResult:
        """Until every rank has ended."""
        try:
            failed_at: float | None = None
            while len(self.ended) < len(self.processes):
                if self._pass_signals_on():
                    self._kill()
                    self._poll()
                    return SpawnResult(EXIT_STOPPED, "killed by a second signal before a save was complete")
                if self._poll() and failed_at is None:
                    failed_at = time.monotonic()
                if failed_at is not None:
                    self._stop_the_rest(time.monotonic() - failed_at)
                time.sleep(_POLL_SECONDS)
            return self._result()
        finally:
            self._kill()  # only an exception in here leaves any

    def _poll(self) -> bool:
        """Note the ranks that have ended; whether one of them failed."""
        failed = False
        for rank, process in self.processes.items():
            if rank not in self.ended and process.poll() is not None:
                self.ended[rank] = time.time()
            if rank in self.ended and process.returncode != 0:
                # A rank that returns 3 has done its part of the save: the others are about to do the same.
                failed |= process.returncode != EXIT_STOPPED or self._report(rank) is not None
        return failed

    def _stop_the_rest(self, seconds: float) -> None:
        """Let the others settle, then ask, then kill."""
        alive = [p for r, p in self.processes.items() if r not in self.ended]
        if self.stopped_at is None and seconds > SETTLE_SECONDS:
            self.stopped_at = time.time()
            hang = self.log_dir is not None and self._first_failure().code == EXIT_LOST_RANK
            for process in alive:
                if hang:  # where was everybody? Into each rank's log
                    process.send_signal(STACKS_SIGNAL)
                process.terminate()
        elif seconds > SETTLE_SECONDS + GRACE_SECONDS:
            self._kill()

    def _pass_signals_on(self) -> bool:
        """Forward what came in; whether a second SIGINT or SIGTERM asks for an end at once."""
        first: float | None = getattr(self, "_first_stop", None)
        while self.received:
            number, when = self.received.pop(0)
            if number != signal.SIGUSR1:
                if first is None:
                    self._first_stop = first = when
                elif when - first > REPEAT_SECONDS:
                    return True
                else:
                    continue
            self.forwarded.add(number)
            for rank, process in self.processes.items():
                if rank not in self.ended:
                    process.send_signal(number)
        return False

    def _kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait()
        _show_cursor()

    def _report(self, rank: int) -> dict | None:
        """The error file of a rank that failed with an exception."""
        try:
            return json.loads((self.error_dir / f"rank_{rank:05d}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _failures(self) -> list[_Failure]:
        failures = []
        for rank, when in self.ended.items():
            status = self.processes[rank].returncode
            report = self._report(rank)
            told = self.stopped_at is not None and when >= self.stopped_at
            if status == 0 or (status == EXIT_STOPPED and report is None):
                continue
            if report is not None and status == report["exit_code"]:
                told = self.stopped_at is not None and report["time"] >= self.stopped_at
                echo = report["secondary"] or told
                message = report["message"] if len(self.processes) == 1 else f"rank {rank}: {report['message']}"
                failures.append(_Failure(rank, status, message, report["time"], echo, report["traceback"]))
            elif status < 0 and -status in self.forwarded:
                name = signal.Signals(-status).name
                failures.append(_Failure(rank, EXIT_STOPPED, f"stopped by {name} before the start", when, told))
            elif status < 0:
                message = f"rank {rank} was killed by {_signal_name(-status)}{_SIGNAL_HINTS.get(-status, '')}"
                failures.append(_Failure(rank, EXIT_LOST_RANK, message, when, told))
            else:
                failures.append(_Failure(rank, status, f"rank {rank} ended with status {status}", when, told))
        return failures

    def _first_failure(self) -> _Failure:
        """The earliest error that is not the echo of another."""
        return min(self._failures(), key=lambda failure: (failure.consequence, failure.time))

    def _result(self) -> SpawnResult:
        if not self._failures():
            stopped = any(process.returncode == EXIT_STOPPED for process in self.processes.values())
            return SpawnResult(EXIT_STOPPED if stopped else 0, "")
        first = self._first_failure()
        return SpawnResult(first.code, first.message, first.rank, first.traceback)


def _catch_signals(received: list[tuple[int, float]]) -> dict[int, object]:
    """Note signals in `received` from now on; the handlers that were there before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {}
    for number in STOP_SIGNALS:
        before[number] = signal.signal(number, lambda n, _frame: received.append((n, time.monotonic())))
    return before


def _import_path() -> list[str]:
    """`sys.path`, with the folder that holds this package (an editable install may not have it there)."""
    home = str(Path(__file__).resolve().parents[1])
    return sys.path if home in sys.path else [*sys.path, home]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_gpus() -> int:
    """NVIDIA GPUs that a process started here would see, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _show_cursor() -> None:
    """A progress bar hides the cursor; a rank that was killed could not bring it back."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
        sys.stderr.flush()
