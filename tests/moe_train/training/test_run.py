"""How a start that failed is told, whoever started the ranks."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from moe_train.errors import UserError
from moe_train.training import run
from moe_train.training.run_folder import RunFolder, now
from moe_train.training.signals import StopRequest
from parallel.layout import Layout
from parallel.spawn import SpawnResult

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def test_a_lost_connection_is_no_bug(tmp_path):
    folder, since = RunFolder(tmp_path), now()
    folder.start("")
    run.leave_outcome(folder, LOST, since)
    assert folder.read_outcome()["code"] == 5
    assert folder.read_outcome()["reason"].startswith("lost the connection to another rank")


def test_the_cause_on_another_rank_is_not_overwritten_by_its_echo(tmp_path):
    folder, since = RunFolder(tmp_path), now()
    folder.start("")
    run.leave_outcome(folder, UserError("web.bin holds token id 99"), since, rank=1)
    run.leave_outcome(folder, LOST, since, rank=0)
    outcome = folder.read_outcome()
    assert outcome["code"] == 2 and outcome["reason"] == "rank 1: web.bin holds token id 99"


def test_an_echo_on_another_rank_leaves_no_outcome(tmp_path):
    folder = RunFolder(tmp_path)
    run.leave_outcome(folder, LOST, now(), rank=1)
    assert folder.read_outcome() == {}


@pytest.mark.parametrize("fails", [True, False])
def test_the_groups_are_left_only_after_success(monkeypatch, fails):
    """After an error other ranks may wait in a collective for ever, and leaving would wait for them."""
    left = []

    def train(*_):
        if fails:
            raise UserError("on this rank alone")
        return 0

    from parallel import engine

    monkeypatch.setattr(engine, "start", lambda *_, **__: SimpleNamespace(device_memory=None))
    monkeypatch.setattr(engine, "stop", lambda: left.append(True))
    monkeypatch.setattr(run, "check_run", lambda *_: [])
    monkeypatch.setattr(run, "_train", train)
    faults, training = SimpleNamespace(step_timeout=1.0), SimpleNamespace(seed=0, deterministic=False)
    config = SimpleNamespace(layout=lambda size: Layout(size, 1, 1, None, 1, size), faults=faults, training=training)
    if fails:
        with pytest.raises(UserError):
            run._start_and_train(config, 1, "auto", StopRequest(), now())
    else:
        assert run._start_and_train(config, 1, "auto", StopRequest(), now()) == 0
    assert left == ([] if fails else [True])


@pytest.mark.parametrize("tasks, starts_ranks", [(1, True), (2, False)])
def test_a_single_task_of_srun_starts_ranks_like_a_shell(monkeypatch, tmp_path, tasks, starts_ranks):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("PROCID", 0), ("NTASKS", tasks), ("STEP_ID", 0), ("JOB_ID", 7)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    done = []
    monkeypatch.setattr(run, "check_run", lambda *_: [])
    monkeypatch.setattr(run, "completion", lambda _: None)
    monkeypatch.setattr(run, "check_host_memory", lambda *_: None)
    monkeypatch.setattr(run, "_payload", lambda *_: {})
    monkeypatch.setattr(run, "run_rank", lambda *_: done.append("a rank") or 0)
    monkeypatch.setattr(run, "spawn_ranks", lambda nproc, *_: done.append(nproc) or SpawnResult(0, ""))
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what a rank exports stays in here
    assert run.pretrain(SimpleNamespace(output_dir=str(tmp_path)), 3 if starts_ranks else None, "auto") == 0
    assert done == ([3] if starts_ranks else ["a rank"])


def test_nproc_is_refused_where_the_ranks_are_started_already(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match="--nproc 4: this process is rank 1 of 8 that torchrun started; leave --nproc out"
    ):
        run.pretrain(SimpleNamespace(output_dir="x"), 4, "auto")
