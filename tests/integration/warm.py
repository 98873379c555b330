"""Starts of `moe-train` without the seconds that imports take: forked from a process that has imported everything.

What a user starts and the ranks below it are processes of their own, killed and signalled as such; only their
interpreters are not fresh. The parent never starts a thread nor joins a group, so that forking it is sound.

    server = WarmServer()
    start = server.start(["pretrain", "run.yaml", "--nproc", "2"], folder)
    said, _ = start.communicate(timeout=60)
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1


class WarmServer:
    """The process that has imported everything, and what to ask of it.

    Args:
        gpu: it and what it starts have what looks like a GPU.
    """

    def __init__(self, gpu: bool = False) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.integration.warm", *["gpu"] * gpu]
        self._process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._said = tempfile.TemporaryDirectory(prefix="warm-")
        self._count = 0

    def start(self, arguments: list[str], folder: Path) -> WarmStart:
        """`moe-train ARGUMENTS` in ``folder``, running."""
        self._count += 1
        output = f"{self._said.name}/{self._count}"
        Path(output).touch()  # it may be killed before it has opened it
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pid = self.ask(start=arguments, folder=str(folder), output=output, environment=environment)
        return WarmStart(self, pid, Path(output))

    def ask(self, **request: Any) -> Any:
        """Send a request to the process and wait for its answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process, and with it all that it started."""
        self._process.stdin.close()
        self._process.wait()
        self._said.cleanup()


class WarmStart:
    """A start that runs or has ended, with the methods of subprocess.Popen that tests use."""

    def __init__(self, server: WarmServer, pid: int, output: Path):
        self._server, self.pid, self._output = server, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(status=self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """(all that it said, None), once it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"it did not end in {timeout:g} s:\n{self._output.read_text()}")
            time.sleep(0.005)
        return self._output.read_text(errors="replace"), None


class _Forked:
    """Stands in for the subprocess.Popen of `parallel.spawn`: a rank that is forked, not executed."""

    def __init__(self, command: list[str], env: dict[str, str], **_: Any):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _end_with(lambda: _as_rank(command, env))

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _as_rank(command: list[str], env: dict[str, str]) -> int:
    from parallel import rank

    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = command[2:3] + command[4:]  # what `-c` makes of them, less the import path
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    rank.main()


def _as_start(request: dict[str, Any]) -> int:
    from moe_train import cli

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    replaced = {name: value for name, value in os.environ.items() if name.startswith("NVTE_")}
    os.environ.clear()
    os.environ.update(request["environment"] | replaced)
    os.chdir(request["folder"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    return cli.main(request["start"])


def _end_with(run) -> NoReturn:
    """End this process with the status that ``run`` returns, or exits with, as an interpreter would."""
    status = 1
    try:
        status = run() or 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    """Answer requests, one line of JSON each, until nobody asks any more."""
    if sys.argv[1:] == ["gpu"]:
        importlib.import_module("tests.cuda_look_alike").install()
    from parallel import spawn

    ours = ("parallel.engine", "moe_train.cli", "moe_train.training.run", "moe_train.training.loop")
    for module in (*ours, "torch._dynamo"):  # which torch's optimizers import when they are made
        importlib.import_module(module)
    spawn.subprocess = type("subprocess", (), {**vars(subprocess), "Popen": _Forked})
    gc.collect()
    gc.freeze()
    running: dict[int, _Child] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            child = _Child(request)
            running[child.pid] = child
            answer = child.pid
        else:
            answer = running[request["status"]].status()
        print(json.dumps(answer), flush=True)


class _Child:
    """A start, as seen from the server."""

    def __init__(self, request: dict[str, Any]):
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            sys.stdin.close()
            _end_with(lambda: _as_start(request))

    def status(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


if __name__ == "__main__":
    _serve()
