"""A hang ends with status 5 and leaves the stacks, with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from parallel.spawn import spawn_ranks

ROOT = str(Path(__file__).resolve().parents[3])
HANG = """
import sys, threading, time
from moe_train.training import watchdog
from moe_train.training.watchdog import Watchdog
watchdog.STACKS_AFTER, watchdog.KILL_AFTER = 0.3, 0.8

def waits_for_a_peer():
    if sys.argv[2] == "lock":
        import ctypes
        ctypes.PyDLL(None).sleep(60)   # holds the interpreter lock
    time.sleep(60)

def reads_ahead():
    time.sleep(60)

threading.Thread(target=reads_ahead, daemon=True).start()
dog = Watchdog(0.4, sys.argv[1])
dog.arm("step 1")
for step in range(2, 5):
    time.sleep(0.2)
    dog.feed(f"step {step}")
waits_for_a_peer()
"""
RANKS = """
import os, time
from moe_train.training.watchdog import Watchdog

def train(folder):
    dog = Watchdog(0.5, f"{folder}/rank_0000{os.environ['RANK']}.log")
    if os.environ["RANK"] == "1":
        dog.arm("step 3")
    hangs_here()

def hangs_here():
    time.sleep(60)
"""


def hang(tmp_path: Path, kind: str) -> tuple[subprocess.CompletedProcess, str]:
    log = tmp_path / "logs" / "rank_00000.log"
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(log), kind], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    return done, log.read_text()


def test_a_hang_leaves_all_stacks_and_ends_with_5(tmp_path):
    done, log = hang(tmp_path, "sleep")
    assert done.returncode == 5
    assert done.stderr.splitlines() == [
        "error: no progress for 0.4 s during step 4: a hang; stacks of all threads are in "
        f"{tmp_path}/logs/rank_00000.log"
    ]
    assert "in waits_for_a_peer" in log and "in reads_ahead" in log and "no progress for 0.4 s during step 4" in log


def test_a_hang_that_holds_the_interpreter_lock(tmp_path):
    done, log = hang(tmp_path, "lock")
    assert done.returncode == -14  # SIGALRM, from the kernel
    assert "in waits_for_a_peer" in log


def test_the_parent_names_the_hang_and_every_rank_leaves_its_stacks(tmp_path, monkeypatch):
    (tmp_path / "hanging_ranks.py").write_text(RANKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = spawn_ranks(2, "hanging_ranks:train", [str(tmp_path)], tmp_path)
    assert result.code == 5 and result.rank == 1 and "no progress for 0.5 s during step 3" in result.message
    for rank in range(2):
        assert "in hangs_here" in (tmp_path / f"rank_0000{rank}.log").read_text()


PATIENT = """
import sys, time
from moe_train.training.watchdog import Watchdog
dog = Watchdog(1.5, sys.argv[1])
dog.arm("step 1")
with dog.allow(30, "save"):
    time.sleep(2.0)
dog.disarm()
time.sleep(2.0)
"""


def test_disarmed_and_allowed_times(tmp_path):
    # In a process of its own: a watchdog that goes off ends it.
    done = subprocess.run([sys.executable, "-c", PATIENT, str(tmp_path / "log")], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "log").read_text() == ""
