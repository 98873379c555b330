"""`launch local` and `launch hostfile`: started again after a failure, and not when that would change nothing; alerts,
cancel."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from launch.hosts import read_hostfile
from launch.local import Local
from launch.supervise import Stall, Supervisor
from moe_train.cli import main
from moe_train.config import load_run
from moe_train.errors import UserError
from moe_train.training.run_folder import now
from tests.launch import runs

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds for whatever happens within seconds on a machine that has nothing else to do."""


def start(path: Path, *arguments: str, verb: tuple[str, ...] = ("local",)) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moe_train", "launch", *verb, str(path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def records(folder: Path, name: str) -> list[dict]:
    path = folder / "run" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_a_killed_rank_is_started_again_and_the_run_completes(tmp_path: Path, webhook, capsys) -> None:
    """With the nodes looked at, and everybody told, by a command and by a webhook."""
    url, messages = webhook
    alert = tmp_path / "alert"
    alert.write_text(f'#!/bin/sh\necho "$2" >> "{tmp_path}/alerts"\n')
    alert.chmod(0o755)
    cluster = {
        "preflight": {"free_gigabytes": 0.001},
        "alert_command": f"{alert} word",
        "alert_webhook": url,
        "dollars_per_gpu_hour": 1.0,
    }
    process = start(runs.write_run(tmp_path, cluster, steps=150), "--nproc", "1")
    until(process, lambda: len(records(tmp_path, "metrics.jsonl")) >= 20)
    os.kill(json.loads((tmp_path / "run/owner.json").read_text())["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "restart 1" in said and "resumed from" in said
    assert [line["step"] for line in records(tmp_path, "metrics.jsonl")] == list(range(1, 151))
    notes = records(tmp_path, "launch/starts.jsonl")
    assert [note["next"] for note in notes if note["kind"] == "end"] == ["start", "over"]
    assert (tmp_path / "alerts").read_text().splitlines() == messages
    lost, over = messages
    assert "killed by SIGKILL" in lost and "restart 1" in lost and over == "run: the run is over, status 0: complete"
    assert json.loads((tmp_path / "run/launch/preflight.json").read_text())["bad"] == {}

    assert main(["launch", "status", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["state"] == "complete"
        and found["step"] == 150
        and len(found["restarts"]) == 1
        and found["dollars_so_far"] > 0
    )
    assert main(["launch", "logs", str(tmp_path / "run"), "--follow"]) == 0
    assert "complete: step 150" in capsys.readouterr().out
    again, _ = start(tmp_path / "run.yaml", "--nproc", "1").communicate(timeout=PATIENCE)  # there is nothing to do
    assert "is complete: step 150" in again and "run: the run is over, status 0: complete" in again


def test_a_mistake_is_not_started_again(tmp_path: Path) -> None:
    path = runs.write_run(tmp_path)
    (tmp_path / "web.bin").unlink()
    process = start(path, "--nproc", "1")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "web.bin" in said and "restart 1" not in said


def test_cancel_saves_first_and_a_second_launcher_is_refused(tmp_path: Path, capsys) -> None:
    path = runs.write_run(tmp_path, {"preflight": None}, steps=20_000)
    process = start(path, "--nproc", "1")
    until(process, lambda: records(tmp_path, "metrics.jsonl"))
    assert main(["launch", "status", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "state     running" in shown and f"process   {process.pid}" in shown
    assert main(["launch", "local", str(path)]) == 2
    assert f"is run by process {process.pid} already" in capsys.readouterr().err
    canceller = start(tmp_path / "run", verb=("cancel",))
    said, _ = process.communicate(timeout=PATIENCE)
    told, _ = canceller.communicate(timeout=PATIENCE)
    assert process.returncode == 3 and canceller.returncode == 0, said + told
    step = records(tmp_path, "metrics.jsonl")[-1]["step"]
    assert f"ended at step {step}" in told
    assert json.loads((tmp_path / "run/launch/over.json").read_text()) == {
        "code": 3,
        "reason": "cancelled",
        "job": None,
    }
    assert int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()) == step


def test_a_full_folder_of_the_run_is_not_tried_again(tmp_path: Path) -> None:
    path = runs.write_run(tmp_path, {"preflight": {"free_gigabytes": 1e9}, "scratch": "/dev/shm"})
    assert main(["launch", "local", str(path), "--nproc", "1"]) == 5
    over = json.loads((tmp_path / "run/launch/over.json").read_text())
    assert over["code"] == 5 and f"the run's folder {tmp_path}/run has" in over["reason"]
    assert [each["kind"] for each in records(tmp_path, "launch/starts.jsonl")] == ["start", "end"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("early", [False, True])
def test_a_signal_to_a_start_that_cannot_catch_it_yet_ends_the_run(tmp_path: Path, name: str, early: bool) -> None:
    supervisor = Supervisor(load_run(runs.write_run(tmp_path, {"preflight": None})), 3, "local")
    restarts = []

    def begin(restart: int) -> Local:
        restarts.append(restart)
        if early:
            os.kill(os.getpid(), signal.Signals[name])
        else:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.Signals[name])).start()
        return Local(["sleep", str(60 if restart == 0 else 0)])  # with no handlers, as one that still imports

    assert supervisor.run(begin) == 3 and restarts == [0]
    over = json.loads((tmp_path / "run/launch/over.json").read_text())
    assert over["code"] == 3 and over["reason"].startswith(f"signal {name}; ")


def test_a_stop_that_is_touched_while_the_ranks_load_is_obeyed(tmp_path: Path) -> None:
    """They clear one that they find."""
    supervisor = Supervisor(load_run(runs.write_run(tmp_path, {"preflight": None})), 3, "local")
    stop = tmp_path / "run/stop"
    wait = "do sleep 0.1; done"
    load = f'until [ "$(stat -c %Y "$0")" != 1 ]; {wait}; rm "$0"; until [ -e "$0" ]; {wait}; exit 3'

    def begin(restart: int) -> Local:
        assert not stop.exists()  # that of an earlier submission
        stop.touch()
        os.utime(stop, (1, 1))
        return Local(["timeout", "60", "sh", "-c", load, str(stop)])

    (tmp_path / "run").mkdir()
    stop.touch()
    assert supervisor.run(begin) == 3


def test_a_start_that_saved_as_a_host_was_cut_off_is_no_end(tmp_path: Path) -> None:
    """Its ranks end with 3, as if somebody had asked for it; the remote shell tells."""
    supervisor = Supervisor(load_run(runs.write_run(tmp_path, {"preflight": None})), 3, "hostfile")

    def begin(restart: int) -> Local:
        if restart == 0:
            supervisor.folder.settle(3, "signal SIGTERM", now())
        return Local(["sh", "-c", f"exit {5 if restart == 0 else 0}"])

    assert supervisor.run(begin) == 0
    ends = [each for each in supervisor.journal.starts() if each["kind"] == "end"]
    assert [(each["code"], each["reason"]) for each in ends] == [
        (5, "a host was lost; signal SIGTERM"),
        (0, "complete"),
    ]


def test_a_run_whose_terminal_is_lost_saves(tmp_path: Path) -> None:
    path = runs.write_run(tmp_path, {"preflight": None}, steps=20_000)
    terminal, slave = os.openpty()
    os.set_blocking(terminal, False)

    def take() -> None:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    def has_steps() -> bool:
        with suppress(BlockingIOError):  # what nobody reads would hold the run up
            os.read(terminal, 1 << 16)
        return bool(records(tmp_path, "metrics.jsonl"))

    command = [sys.executable, "-m", "moe_train", "launch", "local", str(path), "--nproc", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take
    )
    os.close(slave)
    until(process, has_steps)
    os.close(terminal)
    process.wait(timeout=PATIENCE)
    outcome = json.loads((tmp_path / "run/outcome.json").read_text())
    assert (outcome["code"], outcome["reason"]) == (3, "signal SIGHUP")
    assert json.loads((tmp_path / "run/launch/over.json").read_text())["code"] == 3
    assert int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()) == outcome["step"]


def test_a_stall_and_a_recovery_are_told_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    stall = Stall(metrics, 0.2)
    assert stall.look() is None
    metrics.touch()
    os.utime(metrics, (time.time() + 1, time.time() + 1))  # a step of this start
    assert stall.look() is None
    time.sleep(1.5)
    assert "stalls: no step for" in stall.look() and stall.look() is None
    os.utime(metrics)
    assert stall.look() == "recovered: it makes steps again" and stall.look() is None


RSH = """#!/bin/sh
# What ssh does for `ssh HOST COMMAND`, on this machine: a shell that gets the command line, and our stdin.
echo "$1" >> {folder}/hosts.log
shift
exec sh -c "$*"
"""


@pytest.fixture
def machines(tmp_path: Path) -> tuple[str, str]:
    """A hostfile of two machines that are this one under two names, and a remote shell that reaches them."""
    rsh = tmp_path / "rsh"
    rsh.write_text(RSH.format(folder=tmp_path))
    rsh.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1   # the same machine\n")
    return str(hosts), str(rsh)


def test_ranks_on_other_machines_save_when_the_launcher_dies(tmp_path: Path, machines: tuple[str, str]) -> None:
    hosts, rsh = machines
    path = runs.write_run(tmp_path, {"preflight": None}, steps=20_000, parallel={"expert": 2})
    process = start(path, "--rsh", rsh, verb=("hostfile", hosts))
    until(process, lambda: records(tmp_path, "metrics.jsonl"))
    process.kill()
    process.communicate(timeout=PATIENCE)  # the ranks have let go of its output, too
    kinds = {event["kind"]: event for event in records(tmp_path, "events.jsonl")}
    assert kinds["signal"]["signal"] == "SIGTERM" and kinds["stop"]["reason"] == "signal SIGTERM"
    outcome = json.loads((tmp_path / "run/outcome.json").read_text())
    assert outcome["code"] == 3 and outcome["step"] == records(tmp_path, "metrics.jsonl")[-1]["step"]
    assert int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()) == outcome["step"]


def test_the_machines_of_a_hostfile_train_together(tmp_path: Path, machines: tuple[str, str]) -> None:
    """Of which one loses its rank."""
    (hosts, rsh), folder = machines, tmp_path / "a #1"
    folder.mkdir()
    path = runs.write_run(folder, {"preflight": {"free_gigabytes": 0.001}}, steps=150, parallel={"expert": 2})
    process = start(path, "--rsh", rsh, verb=("hostfile", hosts))
    until(process, lambda: len(records(folder, "metrics.jsonl")) >= 20)
    os.kill(json.loads((folder / "run/owner.json").read_text())["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "restart 1" in said and "preflight: 2 nodes are fit; all-reduce" in said, said
    assert [line["step"] for line in records(folder, "metrics.jsonl")] == list(range(1, 151))
    reached = (tmp_path / "hosts.log").read_text().split()
    assert sorted(reached) == ["127.0.0.1"] * 4 + ["localhost"] * 4  # preflight and ranks, twice
    starts = [note for note in records(folder, "launch/starts.jsonl") if note["kind"] == "start"]
    assert [note["nodes"] for note in starts] == ["127.0.0.1,localhost"] * 2


@pytest.mark.parametrize(
    ("text", "names"),
    [("a slots=8\nb slots=8\n", ["a", "b"]), ("# pdsh\nn[08-10,2]x\n\n", ["n08x", "n09x", "n10x", "n2x"])],
)
def test_hostfiles(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "hosts").write_text(text)
    assert [(host.name, host.ranks) for host in read_hostfile(str(tmp_path / "hosts"), 8)] == [
        (name, 8) for name in names
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=8\nb slot=8\n", "hosts:2: 'b slot=8': write a name, or name slots=8"),
        ("a\n", "hosts:1: a has no slots"),
        ("a slots=1\na slots=1\n", "hosts:2: a stands there twice"),
        ("a slots=1\nb slots=2\n", "machines with different slots"),
        ("# none\n", "names no machine"),
    ],
)
def test_mistakes_in_a_hostfile_name_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(str(tmp_path / "hosts"), None)
    assert said in str(caught.value) and "\n" not in str(caught.value)
