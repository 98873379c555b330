"""Requests to stop, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_train.training.signals import StopRequest

ROOT = str(Path(__file__).resolve().parents[3])
# The main thread waits in C for a lock that never comes, as in a collective whose peers have gone: no Python runs
# there, and signals do not interrupt it.
BLOCKED = """
import ctypes, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
from pathlib import Path
from moe_train.training.signals import StopRequest
stop = StopRequest(before_exit=lambda reason: Path(sys.argv[1]).write_text(reason), loading="loading" in sys.argv)
stop.install()
print("ready", flush=True)
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
lock(mutex)
"""


def start(*args: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_reason_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.reason() is None
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert stop.reason() == f"signal {number.name}"
    assert signal.getsignal(number) is before


def test_nothing_is_left_of_it():
    """A thread that outlives the run may free the run's tensors while the interpreter ends, which aborts the
    process."""
    with StopRequest(on_signal=print) as stop:
        assert any(thread.name == "signals" for thread in threading.enumerate())
    assert not any(thread.name == "signals" for thread in threading.enumerate())
    stop.restore()  # once more does no harm


def test_file_and_time_limit(tmp_path):
    stop = StopRequest(stop_file=tmp_path / "stop", max_wall_time=3600)
    assert stop.reason() is None
    (tmp_path / "stop").touch()
    assert stop.reason() == "file stop"
    late = StopRequest(max_wall_time=3600, started=time.monotonic() - 3601)
    assert late.reason() == "max_wall_time 1h"


def test_a_second_signal_ends_a_blocked_process_with_3(tmp_path):
    process = start(str(tmp_path / "outcome"))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # at once again: one request
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "second signal SIGINT" in process.communicate(timeout=5)[1]
    assert process.returncode == 3
    assert "without saving" in (tmp_path / "outcome").read_text()


def test_a_signal_while_there_is_nothing_to_save_ends_a_blocked_process_with_3(tmp_path):
    process = start(str(tmp_path / "outcome"), "loading")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=5)
    assert process.returncode == 3
    assert (tmp_path / "outcome").read_text() == "stopped by SIGUSR1 before the first step, with nothing to save"


def test_the_loss_of_the_terminal_asks_for_a_stop_but_under_nohup(tmp_path):
    process = start(str(tmp_path / "outcome"), "loading")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=5)
    assert process.returncode == 3 and "stopped by SIGHUP" in (tmp_path / "outcome").read_text()
    process = start(str(tmp_path / "outcome"), "loading", "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_the_first_signal_is_told_once():
    told = []
    with StopRequest(on_signal=told.append, loading=True) as stop:
        stop.begin()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        end = time.monotonic() + 5
        while not told and time.monotonic() < end:
            time.sleep(0.01)
    assert told == ["SIGUSR1"]


def test_a_reason_that_was_agreed_on_stays(tmp_path):
    """The ranks hear it when the step is over, and `stop` may be gone by then."""
    stop = StopRequest(tmp_path / "stop")
    assert stop.reason() is None
    (tmp_path / "stop").touch()
    assert stop.reason() == "file stop"
    (tmp_path / "stop").unlink()
    assert stop.reason() == "file stop"
