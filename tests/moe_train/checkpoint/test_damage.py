"""Whatever happens to a file of a checkpoint is found, named, and survived."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from moe_train import cli
from moe_train.checkpoint.folder import POINTER
from moe_train.checkpoint.inspect import verify
from moe_train.checkpoint.load import find_checkpoint, give_up_later
from moe_train.checkpoint.retention import is_verified
from moe_train.errors import DamagedError, HardwareError, UserError
from tests.moe_train.checkpoint.conftest import add_checkpoint


def damage(path, number: random.Random) -> str:
    """One byte other than it was, or the end cut off, or the file gone."""
    kind = number.choice(("flip", "truncate", "delete")) if path.stat().st_size else "delete"
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        os.truncate(path, number.randrange(path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        content[number.randrange(len(content))] ^= 1 << number.randrange(8)
        path.write_bytes(content)
    return kind


def test_two_hundred_damages_are_all_found_and_survived(ranks, tmp_path, capsys) -> None:
    """In a checkpoint of two ranks with everything that a run saves: weights, moments, a tokenizer."""
    folder, number = tmp_path / "checkpoints", random.Random(1)
    (tmp_path / "tokenizer.model").write_bytes(random.Random(2).randbytes(500))
    ranks(2).run(
        "tests.checkpoints_on_ranks:save_each_step", {"expert": 2}, str(folder), 2, str(tmp_path / "tokenizer.model")
    )
    newest, before = folder / "iter_0000002", folder / "iter_0000001"
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) == 7 and {"__0_0.distcp", "__1_0.distcp", ".metadata", "tokenizer.model"} < set(names)
    spare = shutil.copytree(newest, tmp_path / "spare")
    assert cli.main(["checkpoint", "verify", str(newest)]) == 0
    kinds = set()
    for trial in range(200):
        victim = newest / names[trial % len(names)]
        kinds.add((damage(victim, number), victim.name))
        assert cli.main(["checkpoint", "verify", str(newest)]) == 4
        assert victim.name in capsys.readouterr().err
        assert find_checkpoint(folder) == before
        assert victim.name in capsys.readouterr().err
        assert not newest.exists()
        shutil.rmtree(folder / "iter_0000002.damaged")
        shutil.copytree(spare, newest)
    assert len(kinds) == 3 * len(names)
    assert find_checkpoint(folder) == newest


@pytest.mark.parametrize("flip", range(33))
def test_every_byte_of_the_last_hash_counts(run, flip) -> None:
    """Also the one that ends the line: 0x0a and 0x0b are both white space."""
    path = run / "checkpoints" / "iter_0000300" / "manifest.json.xxh3"
    content = bytearray(path.read_bytes())
    assert len(content) == 33
    content[flip] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="manifest.json.xxh3"):
        verify(path.parent)


def test_a_bad_one_is_named_and_set_aside_not_deleted(run, capsys) -> None:
    folder = run / "checkpoints"
    (folder / "iter_0000300" / "run_state.json").write_text("{}")
    (folder / "iter_0000200" / "__0_0.distcp").unlink()
    assert find_checkpoint(folder) == folder / "iter_0000100"
    said = capsys.readouterr().err
    assert "iter_0000300: run_state.json has 2 bytes" in said and "iter_0000200: __0_0.distcp is missing" in said
    assert (folder / "iter_0000300.damaged" / "run_state.json").exists()
    assert (folder / POINTER).read_text() == "100\n"


def test_none_left_stops_the_run_now_and_later(run) -> None:
    folder = run / "checkpoints"
    for path in folder.glob("iter_*"):
        (path / "manifest.json").write_text("{}")
    with pytest.raises(DamagedError, match="iter_0000300: .*iter_0000100: "):
        find_checkpoint(folder)
    (folder / POINTER).unlink()
    with pytest.raises(DamagedError, match="set aside or gone"):  # it must not start from scratch then
        find_checkpoint(folder)


def test_a_folder_that_never_had_one_is_a_new_run(tmp_path) -> None:
    assert find_checkpoint(tmp_path / "checkpoints") is None
    (tmp_path / "iter_0000100.writing.abcd").mkdir()  # killed in its first save
    assert find_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_pointer_to_nothing(run) -> None:
    for path in (run / "checkpoints").glob("iter_*"):
        shutil.rmtree(path)
    with pytest.raises(DamagedError, match="holds no checkpoint that is whole"):
        find_checkpoint(run / "checkpoints")


@pytest.mark.parametrize("content", [None, "", "100\n", "900\n", "nonsense"])
def test_the_pointer_does_not_decide(run, content) -> None:
    """Killed between the rename and the pointer, or somebody's editor: the folders themselves are what
    counts."""
    pointer = run / "checkpoints" / POINTER
    pointer.unlink() if content is None else pointer.write_text(content)
    assert find_checkpoint(run / "checkpoints") == run / "checkpoints" / "iter_0000300"
    assert pointer.read_text() == "300\n"


def test_what_a_killed_save_left_goes(run) -> None:
    folder = run / "checkpoints"
    for name in ("iter_0000400.writing.12ab", "iter_0000100.removing"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").touch()
    assert find_checkpoint(folder) == folder / "iter_0000300"
    assert sorted(path.name for path in folder.glob("iter_*")) == [
        "iter_0000100",
        "iter_0000200",
        "iter_0000300",
    ]


@pytest.mark.parametrize("kept", [False, True])
def test_an_earlier_one_by_its_path_gives_up_the_later_ones(run, tmp_path, capsys, kept) -> None:
    """Also where it is a copy that was kept elsewhere, of one that the run still has."""
    folder = run / "checkpoints"
    path = shutil.copytree(folder / "iter_0000100", tmp_path / "kept") if kept else folder / "iter_0000100"
    assert find_checkpoint(folder, str(path)) == path
    assert (folder / "iter_0000300").exists()  # it is not loaded yet
    give_up_later(folder, path)
    assert "given up" in capsys.readouterr().err
    assert sorted(each.name for each in folder.glob("iter_*")) == [
        "iter_0000100",
        "iter_0000200.superseded",
        "iter_0000300.superseded",
    ]
    if not kept:
        assert is_verified(path) and (folder / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    add_checkpoint(folder, 150)
    assert find_checkpoint(folder) == folder / "iter_0000150"


def test_what_was_given_up_is_taken_up_again(run) -> None:
    folder = run / "checkpoints"
    give_up_later(folder, folder / "iter_0000100")
    add_checkpoint(folder, 150)
    (add_checkpoint(folder, 200) / "manifest.json").write_text("{}")  # as good as another one
    path = find_checkpoint(folder, str(folder / "iter_0000200.superseded"))
    give_up_later(folder, path)
    assert sorted(each.name for each in folder.glob("iter_*")) == [
        "iter_0000100",
        "iter_0000150",
        "iter_0000200.superseded",
        "iter_0000200.superseded2",
        "iter_0000300.superseded",
    ]


def test_one_of_another_run_gives_up_the_later_ones_of_this_folder_alone(run, tmp_path) -> None:
    other = tmp_path / "other" / "checkpoints"
    for step in (50, 900):
        add_checkpoint(other, step)
    give_up_later(other, run / "checkpoints" / "iter_0000100")
    assert (run / "checkpoints" / "iter_0000300").exists()
    assert sorted(path.name for path in other.glob("iter_*")) == ["iter_0000050", "iter_0000900.superseded"]


def test_a_bad_one_by_its_path_is_refused(run) -> None:
    path = run / "checkpoints" / "iter_0000200"
    (path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(DamagedError, match="__0_0.distcp has 0 bytes"):
        find_checkpoint(run / "checkpoints", str(path))
    assert path.exists() and (run / "checkpoints" / "iter_0000300").exists()


def test_a_later_format_is_refused_not_set_aside(run) -> None:
    from moe_train.checkpoint.folder import read_run_state

    path = run / "checkpoints" / "iter_0000300"
    state = json.loads((path / "run_state.json").read_text())
    (path / "run_state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(UserError, match="format 99.*update moe-train"):
        read_run_state(path)


@pytest.mark.parametrize("lost", ["the folder", "a checkpoint", "a file"])
def test_a_node_that_does_not_see_the_files_sets_nothing_aside(ranks, run, tmp_path, lost) -> None:
    """Nor does the run start from nothing where that node has rank 0."""
    blind, newest = shutil.copytree(run, tmp_path / "blind"), "checkpoints/iter_0000300"
    if lost == "a file":
        by_size = sorted((blind / newest).iterdir(), key=lambda path: -path.stat().st_size)
        by_size[1].unlink()  # for rank 1 to check
    else:
        shutil.rmtree(blind / (newest if lost == "a checkpoint" else "checkpoints"))
    held = sorted(path.name for path in (run / "checkpoints").iterdir())

    def found(places: list, which: str) -> str:
        one, other = ranks(2).run("tests.checkpoints_on_ranks:find_each_below", list(map(str, places)), which)
        assert one == other and "\n" not in one
        return one

    for which in ["auto", newest]:
        said = found([run, blind], which)
        assert said.startswith(f"5: {newest}: rank 1 on ") and "is missing" in said and "Nothing was set aside" in said
    if lost == "the folder":
        assert found([blind, run], "auto").startswith("5: checkpoints: rank 1 on ")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == held


def test_what_cannot_be_read_is_not_set_aside(run) -> None:
    """A broken disk or mount: ``--resume auto`` waits for it, and does not go on from an older one."""
    path = run / "checkpoints" / "iter_0000300"
    (path / "__0_0.distcp").unlink()
    (path / "__0_0.distcp").symlink_to("__0_0.distcp")  # as good as a read error: ELOOP
    with pytest.raises(HardwareError, match="rank 0 on .*__0_0.distcp cannot be read .*Nothing was set aside"):
        find_checkpoint(run / "checkpoints")
    assert path.exists()


def test_what_two_ranks_both_find_is_set_aside(ranks, run) -> None:
    """Whichever of them the file is for to check."""
    for path in sorted((run / "checkpoints" / "iter_0000300").iterdir()):
        shutil.copytree(path.parent, run / "spare")
        path.unlink()
        found = ranks(2).run("tests.checkpoints_on_ranks:find", str(run / "checkpoints"), "auto")
        assert found == [str(run / "checkpoints" / "iter_0000200")] * 2
        shutil.rmtree(path.parent.with_name("iter_0000300.damaged"))
        (run / "spare").rename(path.parent)
