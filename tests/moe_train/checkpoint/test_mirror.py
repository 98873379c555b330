"""Copies in a second place: whole or not there, and taken when the run's own disk is gone."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import fsspec
import pytest

from moe_train.checkpoint.config import CheckpointConfig
from moe_train.checkpoint.folder import clean
from moe_train.checkpoint.inspect import verify
from moe_train.checkpoint.load import find_checkpoint, give_up_later
from moe_train.checkpoint.manifest import MANIFEST_HASH
from moe_train.checkpoint.mirror import RUN, Mirror, Mirroring, open_mirror
from moe_train.checkpoint.retention import remove_superseded
from moe_train.errors import DamagedError, UserError
from tests.moe_train.checkpoint.conftest import add_checkpoint


@pytest.fixture(params=["folder", "s3"])
def mirror(request, tmp_path) -> Mirror:
    url = str(tmp_path / "second") if request.param == "folder" else request.getfixturevalue("s3") + "/second"
    return Mirror(url, keep_last=2, run=tmp_path / "run")


def files(mirror: Mirror) -> fsspec.AbstractFileSystem:
    return mirror._files


def copied(mirror: Mirror, path: Path) -> None:
    """Copy ``path`` the way a run does."""
    reports = []
    mirroring = Mirroring(mirror, lambda path, error: reports.append(error))
    mirroring.submit(path)
    assert mirroring.wait(30) and reports == [None]


def test_a_copy_comes_back_when_the_disk_is_gone(run, mirror) -> None:
    folder = run / "checkpoints"
    original = {path.name: path.read_bytes() for path in (folder / "iter_0000300").iterdir()}
    for step in (200, 300):
        mirror.push(folder / f"iter_0000{step}")
    shutil.rmtree(folder)
    found = find_checkpoint(folder, mirror=mirror)
    assert found == folder / "iter_0000300"
    assert {path.name: path.read_bytes() for path in found.iterdir()} == original
    assert verify(found) == 0


def test_the_own_disk_comes_first(run, mirror) -> None:
    mirror.push(run / "checkpoints" / "iter_0000300")
    shutil.rmtree(run / "checkpoints" / "iter_0000300")
    assert find_checkpoint(run / "checkpoints", mirror=mirror).name == "iter_0000200"


def test_damaged_here_whole_there(run, mirror) -> None:
    folder = run / "checkpoints"
    mirror.push(folder / "iter_0000200")
    for path in folder.glob("iter_*"):
        (path / "__0_0.distcp").unlink()
    assert find_checkpoint(folder, mirror=mirror) == folder / "iter_0000200"
    assert (folder / "iter_0000200.damaged").exists()


def test_half_a_copy_is_none(run, mirror) -> None:
    """What a job leaves that dies while it copies: all but the last file, or less."""
    folder = run / "checkpoints"
    mirror.push(folder / "iter_0000200")
    mirror.push(folder / "iter_0000300")
    files(mirror).rm(f"{mirror._root}/iter_0000300/{MANIFEST_HASH}")
    shutil.rmtree(folder)
    assert find_checkpoint(folder, mirror=mirror).name == "iter_0000200"


def test_half_a_copy_keeps_no_later_one_from_its_room(run, mirror) -> None:
    folder = run / "checkpoints"
    mirror.push(folder / "iter_0000100")
    (folder / "iter_0000200" / "run_state.json").unlink()  # what else ends a copy half way: a full disk
    (folder / "iter_0000300" / "__0_0.distcp").unlink()
    for step, left in ((200, [100, 200]), (300, [100, 300])):
        with pytest.raises(OSError):
            mirror.push(folder / f"iter_0000{step}")
        assert mirror.copies() == [f"iter_0000{each}" for each in left]


def test_a_copy_that_cannot_be_looked_at_is_not_half_a_one(run, tmp_path) -> None:
    mirror = Mirror(str(tmp_path / "second"), keep_last=2, run=run)
    mirror.push(run / "checkpoints" / "iter_0000100")
    last = tmp_path / "second" / "iter_0000100" / MANIFEST_HASH
    last.unlink()
    last.symlink_to(MANIFEST_HASH)  # to itself: an error of the system's, not a file that is missing
    mirror.push(run / "checkpoints" / "iter_0000200")
    assert mirror.copies() == ["iter_0000100", "iter_0000200"]


def test_a_damaged_copy_is_passed_over(run, mirror, capsys) -> None:
    folder = run / "checkpoints"
    for step in (200, 300):
        mirror.push(folder / f"iter_0000{step}")
    files(mirror).pipe_file(f"{mirror._root}/iter_0000300/__0_0.distcp", b"rotten")
    shutil.rmtree(folder)
    assert find_checkpoint(folder, mirror=mirror).name == "iter_0000200"
    files(mirror).pipe_file(f"{mirror._root}/iter_0000200/__0_0.distcp", b"rotten")
    shutil.rmtree(folder)
    with pytest.raises(DamagedError, match="iter_0000300: __0_0.distcp has 6 bytes.*iter_0000200"):
        find_checkpoint(folder, mirror=mirror)
    assert not list(folder.glob("iter_*"))


def test_what_is_read_back_is_compared(run, mirror, monkeypatch) -> None:
    monkeypatch.setattr(mirror, "_hash", lambda path: "0" * 32)
    with pytest.raises(DamagedError, match="is not what was copied there"):
        mirror.push(run / "checkpoints" / "iter_0000300")
    assert not mirror._is_whole("iter_0000300")
    monkeypatch.undo()
    mirror.push(run / "checkpoints" / "iter_0000300")  # over the half that is there
    assert mirror._is_whole("iter_0000300")


def test_it_keeps_its_own_few(run, mirror) -> None:
    folder = run / "checkpoints"
    for step in (100, 200, 300):
        mirror.push(folder / f"iter_0000{step}")
    files(mirror).rm(f"{mirror._root}/iter_0000200/{MANIFEST_HASH}")
    mirror.prune("iter_0000300")
    assert mirror.copies() == ["iter_0000100", "iter_0000300"]
    mirror.push(add_checkpoint(folder, 400))
    mirror.prune("iter_0000400")
    assert mirror.copies() == ["iter_0000300", "iter_0000400"]


def test_a_part_that_was_given_up_does_not_come_back(run, mirror) -> None:
    folder = run / "checkpoints"
    for step in (100, 200, 300):
        copied(mirror, folder / f"iter_0000{step}")
    give_up_later(folder, folder / "iter_0000100")
    copied(mirror, add_checkpoint(folder, 150))
    assert mirror.copies() == ["iter_0000150"]
    shutil.rmtree(folder)
    assert find_checkpoint(folder, mirror=mirror).name == "iter_0000150"


def test_a_run_of_the_same_name_is_refused(run, tmp_path) -> None:
    """Whether it is new or has checkpoints of its own; what is there stays as it is."""
    config = CheckpointConfig(copy_to=str(tmp_path / "copies"), copy_keep_last=1)
    here = open_mirror(config, run)
    other = tmp_path / "elsewhere" / "run"
    meanwhile = open_mirror(config, other)  # before there was anything to see
    copied(here, run / "checkpoints" / "iter_0000300")
    with pytest.raises(UserError, match="has the copies of the run in .*, not of .*another copy_to") as caught:
        open_mirror(config, other)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not of"):
        find_checkpoint(other / "checkpoints", mirror=meanwhile)
    with pytest.raises(UserError, match="not of"):
        meanwhile.push(add_checkpoint(other / "checkpoints", 400))
    with pytest.raises(UserError, match="not of"):
        open_mirror(config, other)
    assert here.copies() == ["iter_0000300"]
    shutil.rmtree(run)
    assert find_checkpoint(run / "checkpoints", mirror=open_mirror(config, run)).name == "iter_0000300"
    (tmp_path / "copies" / "run" / RUN).unlink()  # as the message says of a run that was moved
    copied(open_mirror(config, other), other / "checkpoints" / "iter_0000400")
    with pytest.raises(UserError, match="not of"):
        open_mirror(config, run)


def test_a_store_that_does_not_answer_does_not_keep_a_run_from_its_own_disk(run, monkeypatch) -> None:
    def no_answer(self) -> bool:
        raise OSError("the line is down")

    monkeypatch.setattr(Mirror, "check", no_answer)
    mirror = open_mirror(CheckpointConfig(copy_to="memory://bucket/runs"), run)
    assert find_checkpoint(run / "checkpoints", mirror=mirror).name == "iter_0000300"


def test_nothing_anywhere_is_a_new_run(tmp_path, mirror) -> None:
    assert find_checkpoint(tmp_path / "checkpoints", mirror=mirror) is None


def test_each_run_has_its_own_place(tmp_path) -> None:
    config = CheckpointConfig(copy_to="memory://bucket/runs", copy_keep_last=4)
    mirror = open_mirror(config, tmp_path / "demo")
    assert mirror.url == "memory://bucket/runs/demo" and mirror.keep_last == 4
    assert open_mirror(CheckpointConfig(), tmp_path) is None


def test_an_unknown_store_is_a_mistake() -> None:
    with pytest.raises(UserError, match="checkpoint.copy_to: nostore://x"):
        Mirror("nostore://x", 1, Path("run"))


def test_copies_are_made_in_the_background_and_the_newest_counts(run) -> None:
    """While one is copied others fall due: the one in between is passed over, and none in use is removed."""
    folder, begun, go_on, reports = run / "checkpoints", threading.Event(), threading.Event(), []

    class Slow:
        keep_last, url, pushed = 1, "slow", []

        def push(self, path: Path) -> None:
            begun.set()
            assert go_on.wait(30)
            assert path.exists()
            self.pushed.append(path.name)
            if path.name == "iter_0000100":
                raise OSError("the line is down")

        def prune(self, newest: str) -> None:
            pass

    mirroring = Mirroring(Slow(), lambda path, error: reports.append((path.name, error)))
    for step in (100, 200, 300):
        mirroring.submit(folder / f"iter_0000{step}")
        assert begun.wait(30)
    assert mirroring.in_use == {folder / "iter_0000100", folder / "iter_0000300"}
    assert not mirroring.wait(0.01)
    remove_superseded(folder, CheckpointConfig(keep_last=1), mirroring.in_use)
    assert not (folder / "iter_0000200").exists()
    go_on.set()
    assert mirroring.wait(30)
    assert reports == [("iter_0000100", "the line is down"), ("iter_0000300", None)]
    clean(folder)
    mirroring.submit(folder / "iter_0000300")  # and again after a pause
    assert mirroring.wait(30) and len(reports) == 3
