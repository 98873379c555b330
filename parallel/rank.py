"""What one rank does around its work: die with its parent, keep a log, report its first error, end with a status.

`run_rank` is the same under our own spawner (`parallel.spawn`), torchrun and srun. Imports no torch: a rank can be
stopped, and can fail with a clear line, before seconds of imports.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

from parallel.errors import file_mistake, say
from parallel.rank_env import rank_environment

ERROR_DIR = "PARALLEL_ERROR_DIR"
"""Environment variable: the folder where a spawned rank leaves its error file for its parent."""

STACKS_SIGNAL = signal.SIGUSR2
"""A rank that has a log writes the Python stacks of all its threads there when it gets this signal."""

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Ask for a save and an end. So does the loss of the terminal, but to what was started to outlive it (nohup)."""
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOP_SIGNALS += (signal.SIGHUP,)

EXIT_BUG, EXIT_STOPPED, EXIT_LOST_RANK = 1, 3, 5

_PR_SET_PDEATHSIG = 1
# What torch, gloo and NCCL say when the other end of a connection has gone: the failure was elsewhere.
_LOST_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "LostRankError"}
_LOST_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo/transport",
    "timed out waiting",
    "nccl communicator was aborted",
    "ncclremoteerror",
)


def run_rank(target: str, args: list | dict, log_dir: Path | str | None = None) -> int:
    """Call `target` as this rank and return the exit status that it asks for.

    Args:
        target: `package.module:function`; its returned int is the status (None: 0).
        args: positional (list) or keyword (dict) arguments.
        log_dir: where ranks > 0 send stdout and stderr (`rank_00001.log`, appended); rank 0 keeps its own.

    An exception does not come back: it is reported (to the parent's error folder, else on stderr) and the process
    ends with the exception's `exit_code`, with 5 for a connection that another rank dropped or a file that it
    may not use, or with 1. It ends without the interpreter's clean-up, which waits for peers that may have
    gone. An exception whose `exit_code` is 3 (stopped as asked) is no failure: 3 is returned.
    """
    rank = _own_rank()
    # Until the target takes over the signals there is nothing to save.
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_before_start)
    _open_log(rank, log_dir)
    warnings.formatwarning = lambda message, category, file, line, *_: f"warning: {message} ({file}:{line})\n"
    try:
        module, _, function = target.partition(":")
        call = getattr(importlib.import_module(module), function)
        result = call(**args) if isinstance(args, dict) else call(*args)
        return 0 if result is None else int(result)
    except BaseException as error:
        if getattr(error, "exit_code", None) == EXIT_STOPPED:
            # Stopped as asked: no failure, and the other ranks may still be writing.
            if rank == 0:
                say(str(error))
            return EXIT_STOPPED
        _fail(error, log_dir)


def rank_log_path(log_dir: Path | str, rank: int) -> Path:
    """The log of a rank: `rank_00000.log`."""
    return Path(log_dir) / f"rank_{rank:05d}.log"


def report_failure(exit_code: int, message: str, *, secondary: bool = False, trace: str | None = None) -> None:
    """Tell the parent (or, without one, the terminal) why this rank is about to end.

    The first report of a process counts. `secondary` marks an error that another rank's failure caused.
    """
    global _reported
    if _reported:
        return
    _reported = True
    rank = _own_rank()
    folder = os.environ.get(ERROR_DIR)
    if folder:
        record = {
            "rank": rank,
            "exit_code": exit_code,
            "message": message,
            "time": time.time(),
            "secondary": secondary,
            "traceback": trace,
        }
        path = Path(folder) / f"rank_{rank:05d}.json"
        try:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(record), encoding="utf-8")
            os.replace(temporary, path)
            return
        except OSError:
            pass  # the parent has gone, or the disk is full: say it here
    text = (trace or "") + f"error: {'' if rank == 0 else f'rank {rank}: '}{message}\n"
    try:
        os.write(_terminal, text.encode())
    except OSError:
        pass


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has gone."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ in _LOST_TYPES:
            return True
        if isinstance(seen, RuntimeError) and any(word in str(seen).lower() for word in _LOST_WORDS):
            return True
        seen = seen.__cause__
    return False


def exit_status(error: BaseException) -> int:
    """The status that :func:`run_rank` ends with for an exception of its target."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_STOPPED
    # A file that the run began with may be there again, or on another node, at the next start.
    return EXIT_LOST_RANK if is_lost_connection(error) or file_mistake(error) else EXIT_BUG


def main() -> NoReturn:
    """Entry of a spawned rank: `argv` is the parent's pid and a JSON payload {target, args, log_dir}."""
    _die_with_parent(int(sys.argv[1]))
    payload = json.loads(sys.argv[2])
    # The payload is ours alone; what runs below sees a plain command line.
    sys.argv[:] = [payload["target"]]
    sys.exit(run_rank(payload["target"], payload["args"], payload["log_dir"]))


_reported = False
_terminal = 2  # where this rank's own words go when it has no parent


def _own_rank() -> int:
    env = rank_environment()
    return env.rank if env else 0


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, whatever kills the parent."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the line above
        os._exit(EXIT_LOST_RANK)


def _open_log(rank: int, log_dir: Path | str | None) -> None:
    """Send ranks > 0 to their logs, and let STACKS_SIGNAL write every rank's stacks to its log."""
    global _terminal
    if log_dir is None:
        return
    path = rank_log_path(log_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if rank > 0:
        _terminal = os.dup(2)
        os.set_inheritable(_terminal, False)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout.reconfigure(line_buffering=True)
    faulthandler.register(STACKS_SIGNAL, file=log, all_threads=True)


def _stop_before_start(number: int, frame: Any) -> None:
    report_failure(EXIT_STOPPED, f"stopped by {signal.Signals(number).name} with nothing to save")
    os._exit(EXIT_STOPPED)


def _fail(error: BaseException, log_dir: Path | str | None) -> NoReturn:
    """Report `error` and end this process with its status."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        sys.exit(error.code)  # the target ended by itself and has said what it had to say
    full = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    trace = None
    secondary = is_lost_connection(error)
    code = exit_status(error)
    if isinstance(error, SystemExit):
        message = str(error.code)
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif hasattr(error, "exit_code"):
        message = " ".join(str(error).split("\n"))
    elif mistake := file_mistake(error):
        message = mistake
    elif secondary:
        message = "lost the connection to another rank: " + _one_line(error)
    else:
        message, trace = _one_line(error), full
    _write_to_log(log_dir, full)
    report_failure(code, message, secondary=secondary, trace=trace)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _write_to_log(log_dir: Path | str | None, text: str) -> None:
    """The whole traceback goes to the log in any case: a user's error may turn out to be ours."""
    if log_dir is None:
        return
    try:
        with open(rank_log_path(log_dir, _own_rank()), "a", encoding="utf-8") as log:
            log.write(text)
    except OSError:
        pass
