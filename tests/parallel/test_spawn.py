"""Ranks as real processes: what their parent shows, what it returns, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from parallel import spawn
from parallel.rank import is_lost_connection
from parallel.rank_env import expand_tasks_per_node, first_host, free_port, rank_environment
from parallel.spawn import run_ranks, spawn_ranks

RANKS = """
import json, os, signal, sys, time, warnings
from pathlib import Path

class UserMistake(Exception):
    exit_code = 2

def place():
    return int(os.environ["RANK"])

def note(folder):
    keys = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    Path(folder, f"{place()}.json").write_text(json.dumps({k: os.environ[k] for k in keys}))
    print("hello from", place())
    warnings.warn("slower than it might be")
    assert sys.stdin.read() == ""

def sleep(folder):
    Path(folder, f"{place()}.pid").write_text(str(os.getpid()))
    time.sleep(60)

def fails(folder, kind):
    if place() == 1:
        time.sleep(0.3)
        if kind == "user": raise UserMistake("data.mixture: no such file; write it")
        if kind == "bug": raise ValueError("not two lines\\nof this")
        if kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if kind == "status": os._exit(7)
        if kind == "exit": sys.exit(4)
        if kind == "file": open("/dev/null/text")
        if kind == "echo-first": time.sleep(0.3); raise UserMistake("the cause")
    elif kind == "echo-first":
        # What a peer sees: here even before the cause is reported.
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    sleep(folder)

class Stopped(Exception):
    exit_code = 3

def stopped(folder, kind):
    raise Stopped("stopped by signal SIGTERM, saved at step 7")

def all_lost():
    raise RuntimeError("Connection closed by peer")

def saves(folder):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    Path(folder, f"{place()}.pid").write_text(str(os.getpid()))
    while not stop: time.sleep(0.02)
    Path(folder, f"{place()}.saved").write_text("yes")
    return 3

def ignores(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep(folder)
"""

NO_FOLDER = "one of the folders in it is a file: correct the path"

PARENT = """
import sys
sys.path[:0] = {path!r}
from parallel.spawn import run_ranks
sys.exit(run_ranks(2, {target!r}, {args!r}))
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "ranks_under_test.py").write_text(textwrap.dedent(RANKS))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    return "ranks_under_test"


def start_parent(tmp_path: Path, target: str, args: list) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    code = PARENT.format(path=[root, str(tmp_path / "code")], target=target, args=args)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    files = [folder / f"{rank}.pid" for rank in range(2)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files))
    return [int(f.read_text()) for f in files]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_success_with_a_rendezvous_and_logs(ranks, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_ranks(2, f"{ranks}:note", [str(tmp_path)], tmp_path / "logs") == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [s["RANK"] for s in seen] == ["0", "1"] == [s["LOCAL_RANK"] for s in seen]
    assert {s["WORLD_SIZE"] for s in seen} == {"2"} == {s["LOCAL_WORLD_SIZE"] for s in seen}
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"] and int(seen[0]["OMP_NUM_THREADS"]) >= 1
    out, err = capfd.readouterr()
    assert out == "hello from 0\n"
    assert err.startswith("warning: slower than it might be (/") and err.count("\n") == 1
    assert (tmp_path / "logs" / "rank_00001.log").read_text() == f"hello from 1\n{err}"


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("user", 2, "error: rank 1: data.mixture: no such file; write it"),
        ("bug", 1, "error: rank 1: ValueError: not two lines"),
        ("kill", 5, "error: rank 1 was killed by SIGKILL (the kernel does that when memory runs out)"),
        ("status", 7, "error: rank 1 ended with status 7"),
        ("file", 5, f"error: rank 1: /dev/null/text: Not a directory; {NO_FOLDER}"),
        ("exit", 4, "error: rank 1 ended with status 4"),
        ("echo-first", 2, "error: rank 1: the cause"),
    ],
)
def test_the_first_failure_is_shown_and_the_others_go(ranks, tmp_path, capfd, monkeypatch, kind, code, message):
    if kind != "echo-first":
        monkeypatch.setattr(spawn, "SETTLE_SECONDS", 0.2)
    assert run_ranks(2, f"{ranks}:fails", {"folder": str(tmp_path), "kind": kind}) == code
    shown = capfd.readouterr().err
    assert message in shown.splitlines()
    assert ("Traceback" in shown) == (kind == "bug")
    if kind != "echo-first":
        assert not alive(int((tmp_path / "0.pid").read_text()))


def test_a_traceback_goes_to_the_log_of_its_rank(ranks, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(spawn, "SETTLE_SECONDS", 0.2)
    assert run_ranks(2, f"{ranks}:fails", [str(tmp_path), "user"], tmp_path / "logs") == 2
    assert "UserMistake: data.mixture" in (tmp_path / "logs" / "rank_00001.log").read_text()


def test_nothing_but_lost_connections_is_a_lost_rank(ranks):
    result = spawn_ranks(2, f"{ranks}:all_lost", [])
    assert result.code == 5 and "lost the connection to another rank" in result.message


def test_a_terminal_that_has_gone_changes_no_status():
    reader, writer = os.pipe()
    os.close(reader)
    program = (
        "from parallel.spawn import SpawnResult, tell; from moe_train.errors import warn\n"
        "warn('a checkpoint was set aside'); tell(SpawnResult(6, 'rank 0: too many spikes', 0)); raise SystemExit(6)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], stderr=writer, timeout=60)
    os.close(writer)
    assert done.returncode == 6


def test_a_target_that_does_not_exist(ranks):
    result = spawn_ranks(1, f"{ranks}:nothing", [])
    assert result.code == 1 and "has no attribute 'nothing'" in result.message and result.rank == 0


def test_sigkill_of_the_parent_leaves_no_rank(ranks, tmp_path):
    parent = start_parent(tmp_path, f"{ranks}:sleep", [str(tmp_path)])
    children = pids(tmp_path)
    assert all(alive(pid) for pid in children)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(pid) for pid in children), 2.0)


def test_sigterm_is_passed_on_and_the_ranks_save(ranks, tmp_path):
    parent = start_parent(tmp_path, f"{ranks}:saves", [str(tmp_path)])
    pids(tmp_path)
    parent.send_signal(signal.SIGTERM)
    parent.send_signal(signal.SIGTERM)  # at once again, as `timeout` does: one request
    assert parent.communicate(timeout=10)[1] == ""
    assert parent.returncode == 3
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2))


def test_a_rank_that_cannot_save_yet_ends_with_3(ranks, tmp_path):
    parent = start_parent(tmp_path, f"{ranks}:sleep", [str(tmp_path)])
    pids(tmp_path)
    parent.send_signal(signal.SIGUSR1)
    shown = parent.communicate(timeout=10)[1]
    assert parent.returncode == 3
    assert "stopped by SIGUSR1 with nothing to save" in shown and "error" not in shown


def test_a_second_signal_kills(ranks, tmp_path):
    parent = start_parent(tmp_path, f"{ranks}:ignores", [str(tmp_path)])
    children = pids(tmp_path)
    parent.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert all(alive(pid) for pid in children)
    parent.send_signal(signal.SIGINT)
    shown = parent.communicate(timeout=5)[1]
    assert parent.returncode == 3 and "second signal" in shown
    assert not any(alive(pid) for pid in children)


@pytest.mark.parametrize(
    ("kind", "code", "shown"),
    [("user", 2, "error: rank 1: data.mixture: no such file; write it\n"), ("stopped", 3, ""), ("bug", 1, "Traceback")],
)
def test_a_rank_of_another_launcher_answers_for_itself(ranks, tmp_path, kind, code, shown):
    """Under torchrun or srun there is no parent of ours: the rank speaks and ends by itself."""
    target = f"{ranks}:{'stopped' if kind == 'stopped' else 'fails'}"
    call = f"run_rank({target!r}, {[str(tmp_path), kind]!r}, {str(tmp_path)!r})"
    run = f"import sys; from parallel.spawn import run_rank; sys.exit({call})"
    path = f"{Path(__file__).resolve().parents[2]}:{tmp_path / 'code'}"
    env = {"PYTHONPATH": path, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", run], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == code and done.stderr.startswith(shown) and bool(done.stderr) == bool(shown)
    log = (tmp_path / "rank_00001.log").read_text()
    assert ("Traceback" in log) == (kind != "stopped")


def test_the_parent_needs_no_torch():
    code = "import sys, parallel.spawn; sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).resolve().parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_rank_environment_of_torchrun_and_of_srun():
    assert rank_environment({}) is None
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    env = rank_environment({**torchrun, "MASTER_PORT": "1234"})
    assert (env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port) == (5, 8, 1, "a", 1234)
    srun = {
        "SLURM_PROCID": "9",
        "SLURM_NTASKS": "12",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "8,4",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
    }
    assert rank_environment(srun) is None  # a batch script is no rank
    assert rank_environment({**srun, "SLURM_STEP_ID": "4294967290"}) is None  # nor is an interactive shell
    env = rank_environment({**srun, "SLURM_STEP_ID": "0"})
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (9, 12, 1, 4)
    assert env.master_addr == "gpu03" and 1024 < env.master_port < 32768
    other = rank_environment({**srun, "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"})
    assert other.master_port == env.master_port


def test_slurm_notations():
    assert (
        first_host("gpu[03-07,9],x1") == "gpu03" and first_host("a1,a2") == "a1" and first_host("n[1-2]-ib") == "n1-ib"
    )
    assert expand_tasks_per_node("8(x2),4") == [8, 8, 4]


def test_an_echo_is_recognised_through_its_wrapper():
    class LostRankError(RuntimeError):
        pass

    error = ValueError("step failed")
    error.__cause__ = RuntimeError("Connection reset by peer")
    assert is_lost_connection(error) and is_lost_connection(LostRankError())
    assert not is_lost_connection(ConnectionResetError("Connection reset by peer"))  # wandb's, not a rank's
    assert not is_lost_connection(RuntimeError("shapes differ"))


def test_a_free_port_is_none_that_the_kernel_may_give_away() -> None:
    with socket.socket() as taken:
        taken.bind(("", free_port()))
        ports = {free_port() for _ in range(200)}
        assert taken.getsockname()[1] not in ports and len(ports) > 50
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < lowest
