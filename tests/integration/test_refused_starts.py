"""Starts that come to nothing: what they leave in the folder of a run that is at work there, and of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

from moe_train.errors import HardwareError
from moe_train.training.run import leave_outcome
from moe_train.training.run_folder import RunFolder, now
from parallel.rank_env import free_port
from tests.integration import runs
from tests.integration.test_two_starts import OPTIONS, wait_for


def test_a_refused_start_leaves_the_outcome_to_the_run_that_is_at_work(tmp_path) -> None:
    """Launchers believe what stands there: they would end a healthy run. Once the run has ended it tells of itself."""
    runs.write_corpora(tmp_path)
    folder = RunFolder(tmp_path / "run")
    live = runs.start(tmp_path, *OPTIONS, nproc=1)
    wait_for(lambda: folder.metrics_path.exists() and folder.metrics_path.read_text().count("\n") >= 2)
    rank = json.loads((folder.path / "owner.json").read_text())["pid"]
    os.kill(rank, signal.SIGSTOP)
    try:
        before = folder.outcome_path.read_bytes()
        code, said = runs.run(tmp_path, *OPTIONS, "--resume", "never", nproc=1)
        assert code == 2 and "--resume never was given" in said
        assert folder.outcome_path.read_bytes() == before and folder.read_outcome()["ended"] is None
    finally:
        os.kill(rank, signal.SIGCONT)
    said, _ = live.communicate(timeout=60)
    assert live.returncode == 0 == folder.read_outcome()["code"], said

    code, _ = runs.run(tmp_path, *OPTIONS, "--resume", "never", nproc=1)
    assert code == 2 == folder.read_outcome()["code"]


def test_a_rank_that_is_told_to_end_leaves_the_outcome_to_the_one_that_failed(tmp_path, monkeypatch) -> None:
    """As srun and torchrun end the others: a signal would have the launcher start the run again for ever."""
    runs.write_corpora(tmp_path)
    folder, port = RunFolder(tmp_path / "run"), free_port()
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    other_began = now()
    first = runs.start(tmp_path, nproc=None)
    wait_for(lambda: _listens(port))  # for rank 1, which never comes
    leave_outcome(folder, HardwareError("there is no web.bin on node7"), other_began, rank=1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 3 and "before the first step" in said
    outcome = folder.read_outcome()
    assert outcome["code"] == 5 and outcome["reason"] == "rank 1: there is no web.bin on node7"


def test_a_port_that_is_taken_is_named(tmp_path, monkeypatch) -> None:
    runs.write_corpora(tmp_path)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        code, said = runs.run(tmp_path, nproc=None)
    outcome = RunFolder(tmp_path / "run").read_outcome()
    assert code == 5 == outcome["code"] and f"port {port}" in outcome["reason"] and outcome["reason"] in said


def test_a_rank_that_is_stopped_while_it_loads_stops_the_others(tmp_path) -> None:
    runs.write_corpora(tmp_path)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.stop_path.touch()
    start = runs.start(tmp_path)
    children = Path(f"/proc/{start.pid}/task/{start.pid}/children")
    wait_for(lambda: len(children.read_text().split()) == 2)
    first, second = map(int, children.read_text().split())
    os.kill(second, signal.SIGSTOP)  # whom the first one has to wait for
    wait_for(lambda: not folder.stop_path.exists())  # which it removes as it begins to load
    os.kill(first, signal.SIGTERM)
    os.kill(second, signal.SIGCONT)
    said, _ = start.communicate(timeout=60)
    assert start.returncode == 3 == folder.read_outcome()["code"], said
    assert "rank 0: stopped by SIGTERM before the first step, with nothing to save" in said


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0
