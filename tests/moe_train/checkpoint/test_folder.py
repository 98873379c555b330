"""Which checkpoint is meant, how one comes to be, and which ones stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.checkpoint.config import CheckpointConfig
from moe_train.checkpoint.folder import POINTER, checkpoint_name, checkpoints, commit, resolve_checkpoint
from moe_train.checkpoint.load import find_checkpoint
from moe_train.checkpoint.retention import is_verified, mark_verified, remove_superseded
from moe_train.errors import UserError
from moe_train.units import Duration
from tests.moe_train.checkpoint.conftest import add_checkpoint


def test_what_a_path_means(run) -> None:
    folder = run / "checkpoints"
    newest = folder / "iter_0000300"
    assert resolve_checkpoint(newest) == resolve_checkpoint(run) == resolve_checkpoint(str(folder)) == newest
    assert resolve_checkpoint(f"{run}@100") == folder / "iter_0000100"
    newest.rename(run / "converted")
    assert resolve_checkpoint(run / "converted") == run / "converted"
    assert resolve_checkpoint(run) == folder / "iter_0000200"


def test_one_that_was_not_finished_is_not_meant(run) -> None:
    (run / "checkpoints" / "iter_0000300" / "manifest.json.xxh3").unlink()
    told: list[str] = []
    assert resolve_checkpoint(run, told.append).name == "iter_0000200"
    assert told == [f"{run / 'checkpoints' / 'iter_0000300'} is not complete; iter_0000200 is taken"]
    assert resolve_checkpoint(f"{run}@200", told.append) and len(told) == 1


@pytest.mark.parametrize(
    "path, said",
    [("nowhere", "holds no checkpoint"), ("run@150", r"no checkpoint of step 150; it has \[100")],
)
def test_a_path_that_means_none(run, path, said) -> None:
    with pytest.raises(UserError, match=said):
        resolve_checkpoint(run.parent / path)


def test_steps_of_any_length_are_in_order(tmp_path) -> None:
    for step in (12_000_000, 300, 9_999_999):
        (tmp_path / checkpoint_name(step)).mkdir()
    (tmp_path / "iter_0000300.damaged").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["iter_0000300", "iter_9999999", "iter_12000000"]


def test_a_step_that_is_computed_again_replaces_the_first(run) -> None:
    folder = run / "checkpoints"
    writing = (run / "checkpoints" / "iter_0000100").rename(folder / "iter_0000300.writing.77")
    commit(folder / "iter_0000300", writing)
    state = json.loads((folder / "iter_0000300" / "run_state.json").read_text())
    assert state["step"] == 100 and (folder / POINTER).read_text() == "300\n"
    assert [path.name for path in sorted(folder.glob("iter_*"))] == ["iter_0000200", "iter_0000300"]


def kept(folder: Path, **config) -> list[int]:
    remove_superseded(folder, CheckpointConfig(**config))
    return [int(path.name[5:]) for path in checkpoints(folder)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten checkpoints, 100 to 1000 steps, 1000 tokens a step."""
    for step in range(100, 1100, 100):
        path = tmp_path / checkpoint_name(step)
        path.mkdir()
        (path / "run_state.json").write_text(json.dumps({"format_version": 1, "step": step, "tokens": 1000 * step}))
    return tmp_path


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"keep_last": 3}, [800, 900, 1000]),
        ({"keep_last": 20}, list(range(100, 1100, 100))),
        ({"keep_last": 1, "keep_every": Duration(steps=400)}, [400, 800, 1000]),
        ({"keep_last": 1, "keep_every": Duration(steps=450)}, [500, 900, 1000]),
        ({"keep_last": 2, "keep_every": Duration(tokens=300_000)}, [300, 600, 900, 1000]),
    ],
)
def test_the_last_few_and_one_each_so_often(folder, config, expected) -> None:
    assert kept(folder, **config) == expected
    assert kept(folder, **config) == expected  # what stays for good stays the next time


def test_the_last_verified_one_stays(run) -> None:
    folder = run / "checkpoints"
    mark_verified(folder / "iter_0000100")
    assert kept(folder, keep_last=1) == [100, 300]
    mark_verified(folder / "iter_0000300")
    assert kept(folder, keep_last=1) == [300]
    assert json.loads((folder / "verified.json").read_text()).keys() == {"iter_0000100", "iter_0000300"}
    add_checkpoint(folder, 400)
    mark_verified(folder / "iter_0000400")
    assert json.loads((folder / "verified.json").read_text()).keys() == {"iter_0000300", "iter_0000400"}


def test_resuming_verifies(run) -> None:
    assert not is_verified(run / "checkpoints" / "iter_0000300")
    find_checkpoint(run / "checkpoints")
    assert is_verified(run / "checkpoints" / "iter_0000300")
    assert not is_verified(run / "checkpoints" / "iter_0000200")


def test_another_checkpoint_of_the_same_name_is_not_verified(run) -> None:
    path = run / "checkpoints" / "iter_0000300"
    mark_verified(path)
    state = json.loads((path / "run_state.json").read_text())
    path.rename(run / "old")
    add_checkpoint(run / "elsewhere", 301).rename(path)
    assert state["step"] == 300 and not is_verified(path)
