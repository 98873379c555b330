"""What is said about a run before a rank is started."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_pipeline.errors import DataError, MissingDataError
from data_pipeline.indexed import IndexedWriter
from data_pipeline.ledger import Ledger
from data_pipeline.sources import open_sources
from moe_train.config import load_run
from moe_train.dry_run import dry_run
from moe_train.errors import HardwareError, UserError
from moe_train.training.branch import branch
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
    ledger = Ledger.start(config.mixture, open_sources(config.mixture)).to_dict()
    state = {"format_version": 1, "step": step, "samples": step * config.training.global_batch_size, "ledger": ledger}
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    (Path(config.output_dir) / "config.yaml").write_text(config.to_yaml())
    return checkpoint


def edit_mixture(folder: Path, old: str, new: str) -> None:
    path = folder / "mixture.yaml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


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


def test_files_of_the_last_start_may_have_another_name_by_now(load, tmp_path):
    """The mixture is recorded as changed, the cluster is nobody's business: neither file is looked for."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("name: ours\n")
    leave_checkpoint(load(f"launch.cluster={cluster}"), 4)
    cluster.unlink()
    (tmp_path / "mixture.yaml").rename(tmp_path / "mixture_v2.yaml")
    changes = check_run(load(f"data.mixture={tmp_path / 'mixture_v2.yaml'}"), 1, "auto")
    assert [change.key for change in changes] == ["data.mixture"]


@pytest.mark.parametrize("gone", ["web.bin", "web.idx", "."])
def test_a_corpus_that_the_run_has_read_before_is_no_mistake_of_its_user(load, tmp_path, gone):
    """A node without the mount: another one, or a later start, goes on."""
    corpora = tmp_path / "corpora"
    edit_mixture(tmp_path, "web.bin", "corpora/web.bin")
    corpora.mkdir()
    for name in ("web.bin", "web.idx"):
        (tmp_path / name).rename(corpora / name)
    checkpoint = leave_checkpoint(load(), 4)
    (corpora / gone).rename(tmp_path / "elsewhere")
    for resume in ("auto", str(checkpoint)):
        with pytest.raises(HardwareError, match=r"web\.\S+.* on \S+, but the run has read it before: mend the mount"):
            check_run(load(), 1, resume)
    with pytest.raises(HardwareError):
        dry_run(load())
    with pytest.raises(MissingDataError, match="source 'web'"):  # a new run
        check_run(load(f"output_dir={tmp_path / 'new'}"), 1, "auto")
    edit_mixture(tmp_path, "corpora/web.bin", "corpora/wbe.bin")
    with pytest.raises(MissingDataError, match="there is no .*/wbe.bin; check the path"):
        check_run(load(), 1, "auto")


def test_a_new_source_that_is_not_there_is_a_mistake_also_of_a_run_under_way(load, tmp_path):
    leave_checkpoint(load(), 4)
    edit_mixture(tmp_path, "  code:\n", "  more:\n    paths: [more.bin]\n  code:\n")
    with pytest.raises(MissingDataError, match="source 'more': there is no"):
        check_run(load(), 1, "auto")
    (tmp_path / "web.bin").unlink()
    with pytest.raises(HardwareError, match="source 'web': there is no"):
        check_run(load(), 1, "auto")


def test_a_source_that_runs_out_is_told(load, tmp_path):
    edit_mixture(tmp_path, "max_epochs: 3", "max_epochs: 0.1")
    with pytest.raises(DataError, match="source 'code' would be read .* but its max_epochs is 0.1"):
        check_run(load(), 1, "auto")


def test_an_edit_of_the_past_is_told_and_one_of_the_future_is_not(load, tmp_path):
    checkpoint = leave_checkpoint(load(), 24)  # in the second phase, which began with step 20
    edit_mixture(tmp_path, "name: decay\n  tokens: 1280", "name: decay\n  tokens: 6400")
    assert check_run(load(), 1, "auto") == []
    edit_mixture(tmp_path, "name: stable\n  tokens: 1280", "name: stable\n  tokens: 2560")
    for resume in ("auto", str(checkpoint)):
        with pytest.raises(DataError, match="phase 'stable' is finished with 1280 tokens but now has 2560"):
            check_run(load(), 1, resume)
    with pytest.raises(DataError, match="is finished"):
        dry_run(load())


def test_a_dry_run_plans_a_run_under_way_from_where_it_stands(load, tmp_path, capsys):
    """An edit in the middle of a phase counts from there: a new run would read more of the source than it has."""
    edit_mixture(tmp_path, "max_epochs: 3", "max_epochs: 0.78")  # of 124 windows
    leave_checkpoint(load(), 24)
    edit_mixture(tmp_path, "web: 1\n", "web: 0.01\n")
    with pytest.raises(DataError, match="source 'code' would be read"):
        dry_run(load(f"output_dir={tmp_path / 'new'}"))
    dry_run(load())
    tables = capsys.readouterr().out.partition("whole run")[2]
    assert [line.split()[-2] for line in tables.splitlines() if "code" in line] == ["0.734"]


def test_a_dry_run_that_cannot_tell_what_was_fed_shows_a_new_run(load, tmp_path, capsys):
    edit_mixture(tmp_path, "max_epochs: 3", "max_epochs: 0.1")
    dry_run(load(f"checkpoint.copy_to={tmp_path / 'copies'}"))  # which may hold another past
    said = capsys.readouterr().out
    assert "found out when it starts" in said and "warning: source 'code' would be read" in said


def test_a_branch_is_checked_before_its_folder_is_made(load, tmp_path):
    config = load()
    leave_checkpoint(config, 24)
    edit_mixture(tmp_path, "seed: 3", "seed: 4")
    with pytest.raises(DataError, match="seed was changed from 3 to 4"):
        branch(f"{config.output_dir}@24", str(tmp_path / "run.yaml"), [f"output_dir={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


def test_a_schedule_in_steps_that_another_batch_moves_is_told(load):
    leave_checkpoint(load("schedule.warmup=10 steps"), 4)
    changes = check_run(load("schedule.warmup=10 steps", "training.global_batch_size=8"), 1, "auto")
    assert [str(change) for change in changes if change.key == "schedule.warmup"] == ["schedule.warmup 640 -> 1280"]


def test_a_dry_run_refuses_what_a_start_would(load):
    leave_checkpoint(load(), 4)
    with pytest.raises(UserError, match="model.hidden_size 16 -> 32"):
        dry_run(load("model.hidden_size=32"))


def test_validation_that_is_asked_for_where_nothing_is_held_out_is_told(load, tmp_path, capsys):
    def warnings(*overrides: str) -> list[str]:
        dry_run(load(*overrides))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]

    what, remedy = "no held-out window of 16 tokens in", "keep text back with `moe-train prepare --holdout`"
    assert warnings() == [f"warning: data.validation measures not all: {what} code; {remedy}"]
    for kind in ("bin", "idx"):
        (tmp_path / f"web.heldout.{kind}").unlink()
    assert warnings() == [f"warning: data.validation measures nothing: {what} web, code; {remedy}"]
    with IndexedWriter(tmp_path / "web.heldout", np.uint16) as writer:
        writer.add([1] * 16)  # a window has one more
    assert warnings() == [f"warning: data.validation measures nothing: {what} web, code; {remedy}"]
    assert warnings("data.validation=null") == []
    path = tmp_path / "run.yaml"
    run = yaml.safe_load(path.read_text())
    del run["data"]["validation"]  # as it is by default, nobody asked for it
    path.write_text(yaml.safe_dump(run))
    assert warnings() == []


def test_a_dry_run_shows_what_changed(load, capsys):
    leave_checkpoint(load(), 4)
    dry_run(load("optimizer.lr=1e-3"))
    assert "optimizer.lr 0.0005 -> 0.001, since the last start" in capsys.readouterr().out
