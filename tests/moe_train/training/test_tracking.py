"""Trackers on real files: wandb offline, TensorBoard; without network, account, or the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.errors import UserError
from moe_train.training.config import LoggingConfig, WandbConfig
from moe_train.training.tracking import Trackers, grouped

ROOT = str(Path(__file__).resolve().parents[3])
WANDB = """
import json, sys
from moe_train.training.config import LoggingConfig, WandbConfig
from moe_train.training.tracking import Trackers
trackers = Trackers(LoggingConfig(wandb=WandbConfig(project="p")), sys.argv[1], {"a": 1})
for step in range(int(sys.argv[2]), int(sys.argv[2]) + 2):
    trackers.log({"step": step, "tokens": step * 100, "loss": 1.5, "lr": 0.25, "phase": "stable"})
state = trackers.state()
trackers.close()
print(json.dumps(state))
"""


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_names_in_groups():
    line = {
        "step": 1,
        "tokens": 2,
        "phase": "stable",
        "loss": 1.0,
        "z_loss": 2.0,
        "mfu": None,
        "grad_norm": float("inf"),
        "lr": 3.0,
        "validation": {"code": {"loss": 4.0}},
        "router/max_over_mean": 5.0,
        "skipped": 0,
    }
    assert dict(grouped(line)) == {
        "train/loss": 1.0,
        "router/z_loss": 2.0,
        "optimizer/lr": 3.0,
        "validation/code/loss": 4.0,
        "router/max_over_mean": 5.0,
        "train/skipped": 0,
    }


def test_wandb_offline_is_one_quiet_run_over_two_starts(tmp_path, no_key):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    states = []
    for first in (1, 3):
        command = [sys.executable, "-c", WANDB, str(folder), str(first)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        states.append(json.loads(done.stdout))
    assert states[0] == states[1]
    run_id = states[0]["wandb"]["run_id"]
    files = sorted((folder / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files and all(b"train/loss" in file.read_bytes() and b"tokens" in file.read_bytes() for file in files)


def test_the_id_comes_from_the_checkpoint_where_the_folder_is_new(tmp_path, no_key, monkeypatch):
    from moe_train.training.tracking import _run_id

    assert _run_id(tmp_path / "a", {"run_id": "abc"}) == "abc"
    assert _run_id(tmp_path / "a", {"run_id": "other"}) == "abc"  # the folder knows better
    monkeypatch.setenv("WANDB_RUN_ID", "job")
    assert _run_id(tmp_path / "b", None) == "job"


def test_wandb_online_needs_a_key(tmp_path, no_key):
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        Trackers(LoggingConfig(wandb=WandbConfig(mode="online")), tmp_path, {})


def test_a_name_that_wandb_does_not_take_is_a_mistake(tmp_path, no_key):
    pytest.importorskip("wandb")
    with pytest.raises(UserError, match="logging.wandb: Invalid project name 'a/b'.*; correct it"):
        Trackers(LoggingConfig(wandb=WandbConfig(project="a/b")), tmp_path, {})


@pytest.mark.parametrize(
    ("package", "logging"), [("wandb", {"wandb": {}}), ("torch.utils.tensorboard", {"tensorboard": True})]
)
def test_a_missing_package_is_named(tmp_path, no_key, monkeypatch, package, logging):
    monkeypatch.setitem(sys.modules, package, None)  # what an import of a missing package meets
    with pytest.raises(UserError, match="pip install"):
        Trackers(LoggingConfig(**logging), tmp_path, {})


def test_tensorboard_over_steps_and_tokens_and_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, end in ((0, 3), (0, 4), (2, 5)):
        trackers = Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, step=start, tokens=start * 100)
        for step in range(start + 1, end + 1):
            trackers.log({"step": step, "tokens": step * 100, "loss": float(start)})
        trackers.close()
    for axis, scale in (("by_step", 1), ("by_tokens", 100)):
        events = EventAccumulator(str(tmp_path / "tensorboard" / axis)).Reload()
        points = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert points == [(1 * scale, 0.0), (2 * scale, 0.0), (3 * scale, 2.0), (4 * scale, 2.0), (5 * scale, 2.0)]


def test_a_tracker_that_cannot_start_is_told_and_left_out(tmp_path):
    told = []
    (tmp_path / "tensorboard").touch()  # where its folder would be
    trackers = Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, warn=told.append)
    trackers.log({"step": 1, "tokens": 1, "loss": 1.0})
    trackers.close()
    assert len(told) == 1 and told[0].startswith("tensorboard cannot start")


def test_a_tracker_that_fails_is_dropped_and_told_once(tmp_path):
    told = []
    trackers = Trackers(LoggingConfig(tensorboard=True), tmp_path, {}, warn=told.append)
    trackers._trackers["tensorboard"]._by_step.close()
    trackers._trackers["tensorboard"]._by_step = None
    for step in (1, 2):
        trackers.log({"step": step, "tokens": step, "loss": 1.0})
    trackers.close()
    assert len(told) == 1 and told[0].startswith("tensorboard stopped tracking")
