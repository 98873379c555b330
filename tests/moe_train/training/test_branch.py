"""What `moe-train branch` makes of the new run's folder before the run starts."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest

from moe_train.checkpoint.folder import resolve_checkpoint
from moe_train.errors import UserError
from moe_train.training import branch
from moe_train.training.run_folder import RunFolder


@pytest.fixture
def branched(tmp_path, monkeypatch):
    """Branch tmp_path/old@8 into tmp_path/new, while something may happen; returns what the run was started with."""
    old = tmp_path / "old"
    checkpoint = old / "checkpoints" / "iter_0000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run_state.json").write_text("{}")
    (old / "metrics.jsonl").write_text('{"step": 8}\n')
    (old / "trackers.json").write_text('{"wandb": {"run_id": "origin"}}')
    started, meanwhile = [], []
    monkeypatch.setattr(branch, "load_run", lambda *_: SimpleNamespace(output_dir=str(tmp_path / "new")))
    monkeypatch.setattr(branch, "check_mixture", lambda *_: [happens() for happens in meanwhile])
    monkeypatch.setattr(branch, "pretrain", lambda config, nproc, resume: started.append(resume) or 0)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)

    def run(*happens):
        meanwhile[:] = happens
        branch.branch(f"{old}@8", "new.yaml")
        return started

    return run


def test_an_interrupted_branch_goes_on_from_its_origin(branched, tmp_path):
    """Before its first save the only checkpoint there is must be found by the usual resume."""
    assert branched() == ["auto"]
    found = resolve_checkpoint(tmp_path / "new")
    assert found == tmp_path / "new/checkpoints/iter_0000008" and (found / "run_state.json").exists()
    assert RunFolder(tmp_path / "new").metrics_path.read_text() == '{"step": 8}\n'
    with pytest.raises(UserError, match="holds a run already"):
        branched()


@pytest.fixture
def full_disk(monkeypatch):
    """Files grow no further than to one byte; on another file system than the origin's."""

    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(branch.os, "link", no_link)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_branch_onto_a_full_disk_is_one_line_and_can_be_started_again(branched, tmp_path, full_disk):
    """Nothing stays that would be taken for a run: that one would begin with initial weights."""
    with pytest.raises(UserError, match=r"cannot be copied into .*new \(.*File too large.*again") as said:
        branched()
    assert "\n" not in str(said.value) and not RunFolder(tmp_path / "new").holds_run
    full_disk()
    assert branched() == ["auto"]
    assert RunFolder(tmp_path / "new").metrics_path.read_text() == '{"step": 8}\n'


def test_a_branch_of_what_its_origin_removes_meanwhile_is_one_line(branched, tmp_path):
    with pytest.raises(UserError, match="No such file or directory: .*iter_0000008"):
        branched(lambda: shutil.rmtree(tmp_path / "old/checkpoints/iter_0000008"))
    assert not RunFolder(tmp_path / "new").holds_run


def test_a_branch_that_was_killed_can_be_started_again(branched, tmp_path, monkeypatch):
    if (child := os.fork()) == 0:
        monkeypatch.setattr(branch, "commit", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        branched()
    os.waitpid(child, 0)
    assert list((tmp_path / "new/checkpoints").glob("iter_*"))
    assert branched() == ["auto"]
    assert [path.name for path in (tmp_path / "new/checkpoints").glob("iter_*")] == ["iter_0000008"]


def test_a_branch_is_a_run_of_its_own_to_the_trackers(branched, tmp_path):
    branched()
    assert json.loads((tmp_path / "new/trackers.json").read_text())["wandb"]["run_id"] != "origin"


def test_only_rank_0_prepares_the_folder(branched, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    branched()
    monkeypatch.setenv("RANK", "1")
    assert branched() == ["auto", "auto"]  # it does not take rank 0's work for another run
