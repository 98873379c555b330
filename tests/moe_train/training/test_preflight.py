"""What is said about a run before a rank is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.config import load_run
from moe_train.dry_run import dry_run
from moe_train.errors import UserError
from moe_train.training.preflight import check_run
from tests.integration.runs import write_corpora


@pytest.fixture
def load(tmp_path):
    """The run file of a small run, with overrides."""
    write_corpora(tmp_path)
    return lambda *overrides: load_run(tmp_path / "run.yaml", ["parallel.expert=1", *overrides])


def leave_checkpoint(config, step: int) -> Path:
    """As far as preflight looks: a folder whose last start was ``config``'s."""
    checkpoint = Path(config.output_dir) / f"checkpoints/iter_{step:07d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run_state.json").write_text(json.dumps({"format_version": 1, "step": step}))
    (Path(config.output_dir) / "config.yaml").write_text(config.to_yaml())
    return checkpoint


def test_a_missing_start_is_told_before_a_rank_is_started(load):
    config = load("checkpoint.initialize_from=nowhere")
    with pytest.raises(UserError, match="checkpoint.initialize_from: .*nowhere: no such checkpoint"):
        check_run(config, 1, "auto")
    leave_checkpoint(config, 4)
    assert check_run(config, 1, "auto") == []  # ignored once the run has checkpoints of its own
    with pytest.raises(UserError, match="--resume nowhere: no such checkpoint"):
        check_run(load(), 1, "nowhere")


def test_a_checkpoint_may_be_named_by_run_and_step(load):
    config = load()
    leave_checkpoint(config, 4)
    assert check_run(config, 1, f"{config.output_dir}@4") == []
    with pytest.raises(UserError, match="no such checkpoint"):
        check_run(config, 1, f"{config.output_dir}@5")


def test_an_older_checkpoint_of_the_same_run_goes_by_the_same_rules(load):
    checkpoint = leave_checkpoint(load(), 4)
    assert [change.key for change in check_run(load("optimizer.lr=1e-3"), 1, str(checkpoint))] == ["optimizer.lr"]
    with pytest.raises(UserError, match="training.seed 1234 -> 5"):
        check_run(load("training.seed=5"), 1, str(checkpoint))


def test_a_dry_run_refuses_what_a_start_would(load):
    leave_checkpoint(load(), 4)
    with pytest.raises(UserError, match="model.hidden_size 16 -> 32"):
        dry_run(load("model.hidden_size=32"))


def test_a_dry_run_shows_what_changed(load, capsys):
    leave_checkpoint(load(), 4)
    dry_run(load("optimizer.lr=1e-3"))
    assert "optimizer.lr 0.0005 -> 0.001, since the last start" in capsys.readouterr().out
