"""What `moe-train branch` makes of the new run's folder before the run starts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from moe_train.checkpoint.folder import resolve_checkpoint
from moe_train.errors import UserError
from moe_train.training import branch
from moe_train.training.run_folder import RunFolder


@pytest.fixture
def branched(tmp_path, monkeypatch):
    """Branch tmp_path/old@8 into tmp_path/new; returns what the run was started with."""
    old = tmp_path / "old"
    checkpoint = old / "checkpoints" / "iter_0000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run_state.json").write_text("{}")
    (old / "metrics.jsonl").write_text('{"step": 8}\n')
    (old / "trackers.json").write_text('{"wandb": {"run_id": "origin"}}')
    started = []
    monkeypatch.setattr(branch, "load_run", lambda *_: SimpleNamespace(output_dir=str(tmp_path / "new")))
    monkeypatch.setattr(branch, "check_mixture", lambda *_: None)
    monkeypatch.setattr(branch, "pretrain", lambda config, nproc, resume: started.append(resume) or 0)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)

    def run():
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


def test_a_branch_is_a_run_of_its_own_to_the_trackers(branched, tmp_path):
    branched()
    assert json.loads((tmp_path / "new/trackers.json").read_text())["wandb"]["run_id"] != "origin"


def test_only_rank_0_prepares_the_folder(branched, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    branched()
    monkeypatch.setenv("RANK", "1")
    assert branched() == ["auto", "auto"]  # it does not take rank 0's work for another run
