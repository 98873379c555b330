"""Runs on a disk that is full or cannot be written: what is said, what goes on, what is left."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from moe_train.checkpoint.folder import checkpoints
from moe_train.checkpoint.inspect import verify
from moe_train.training.run_folder import MetricsLog, RunFolder, read_metrics
from tests.integration import runs

OPTIONS = ("data.validation=null", "parallel.expert=1")


def command(*words: str) -> bool:
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: too small for two checkpoints and the other files of a run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or not command("mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)):
        pytest.skip("needs the right to mount")
    yield disk
    assert command("umount", "-l", str(disk))


@pytest.fixture
def frozen(tmp_path):
    """``frozen(folder)``: from then on nobody, not even root, writes into it; ``thaw(folder)`` undoes it."""
    done = []

    def freeze(folder) -> None:
        if os.geteuid() == 0:
            if not command("chattr", "+i", str(folder)):
                pytest.skip("needs a file system with immutable folders")
        else:
            folder.chmod(0o500)
        done.append(folder)

    def thaw(folder) -> None:
        command("chattr", "-i", str(folder)) if os.geteuid() == 0 else folder.chmod(0o700)

    yield freeze, thaw
    for folder in done:
        thaw(folder)


def test_a_full_disk_costs_the_steps_since_the_last_save(tmp_path, small_disk) -> None:
    runs.write_corpora(tmp_path)
    run = RunFolder(small_disk / "run")
    options = (*OPTIONS, f"output_dir={run.path}", "checkpoint.interval=8 steps")
    code, said = runs.run(tmp_path, *options)
    assert code == 6 and "No space left on device" in said and "metrics.jsonl cannot be written" in said, said
    assert "the ones before are untouched" in said and "the last checkpoint could not be written" in said
    assert run.read_outcome()["code"] == 6 and "step 40, 2.56K of 2.56K tokens" in said  # trained to the end
    assert len(checkpoints(run.checkpoints)) < 5
    assert verify(run.path, every=True) == 0 and not list(run.checkpoints.glob("*.writing*"))
    assert command("mount", "-o", "remount,size=8m", str(small_disk))
    code, said = runs.run(tmp_path, *options)
    assert code == 0 and "resumed from" in said, said
    assert [line["step"] for line in read_metrics(run.path)] == list(range(1, 41))
    code, said = runs.run(tmp_path, *OPTIONS, f"output_dir={tmp_path}/steady", "checkpoint.interval=8 steps")
    assert code == 0, said
    assert runs.arithmetic(runs.metrics(run.path)) == runs.arithmetic(runs.metrics(tmp_path / "steady"))


def test_a_full_disk_stops_the_run_if_the_config_says_so(tmp_path, small_disk) -> None:
    runs.write_corpora(tmp_path)
    run = RunFolder(small_disk / "run")
    options = (*OPTIONS, f"output_dir={run.path}", "checkpoint.interval=8 steps", "checkpoint.on_failed_save=stop")
    code, said = runs.run(tmp_path, *options)
    assert code == 6 and "No space left on device" in said and "of 2.56K tokens" in said, said
    assert "step 40," not in said


def test_checkpoints_that_cannot_be_written(tmp_path, frozen) -> None:
    freeze, thaw = frozen
    runs.write_corpora(tmp_path)
    run = RunFolder(tmp_path / "run")
    assert runs.run(tmp_path, *OPTIONS, "training.max_steps=8")[0] == 0
    freeze(run.checkpoints)
    code, said = runs.run(tmp_path, *OPTIONS)
    assert code == 6 and "iter_0000016 was not written" in said and "resumed from" in said, said
    assert len(read_metrics(run.path)) == 40
    thaw(run.checkpoints)
    assert runs.run(tmp_path, *OPTIONS)[0] == 0


def test_a_place_that_cannot_be_written_is_a_mistake(tmp_path, frozen) -> None:
    runs.write_corpora(tmp_path)
    (tmp_path / "place").mkdir()
    frozen[0](tmp_path / "place")
    code, said = runs.run(tmp_path, *OPTIONS, f"output_dir={tmp_path}/place/run")
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    assert said.startswith(f"error: output_dir {tmp_path}/place/run cannot be written (")


def test_lines_wait_for_room(small_disk) -> None:
    (small_disk / "ballast").write_bytes(bytes(600_000))
    log = MetricsLog(small_disk / "metrics.jsonl", 0)
    for step in range(1, 101):
        log.append({"step": step, "text": "x" * 2000})
    assert log.failure == "No space left on device"
    written = read_metrics(small_disk / "metrics.jsonl")  # whole lines alone
    assert 0 < len(written) < 100
    (small_disk / "ballast").unlink()
    log.append({"step": 101})
    assert log.failure is None
    log.close()
    assert [line["step"] for line in read_metrics(small_disk / "metrics.jsonl")] == list(range(1, 102))
