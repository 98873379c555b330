"""Nodes that are unfit, and nodes that are cut off, on a real Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch.launched import PATIENCE, Launched


@pytest.fixture
def full(slurm):
    """A folder that lies on a full disk on the first node of partition `last`: (the folder, the names of its three
    nodes)."""
    slurm.resume()
    folder = slurm.folder / "scratch"
    folder.mkdir(exist_ok=True)
    names = [f"node{number}" for number in range(slurm.nodes - 2, slurm.nodes + 1)]
    slurm.fill_disk(names[0], folder)
    yield folder, names
    slurm.power_off(names[0])  # its disk goes with it
    slurm.start_node(names[0], "-b")
    slurm.resume()


def test_an_unfit_node_is_named_and_left_out(slurm, tmp_path: Path, full) -> None:
    """By another job, by the later ones of a chain, and in place where there are spare nodes."""
    folder, (bad, *others) = full
    cluster = {"partition": "last", "scratch": str(folder), "preflight": {"free_gigabytes": 0.001}}
    run = Launched(slurm, tmp_path / "chain", steps=30, cluster=cluster)
    run.submit("--chain", "2")
    run.until_over(0)
    assert run.nodes() == others and run.step() == 30
    first, second, third = run.jobs()  # the third takes the place of the first
    assert run.ends()[0]["next"] == f"job {third} without them" and run.ends()[0]["reason"] == f"unfit nodes: {bad}"
    assert run.starts()[1]["job"] == second
    assert all(f"ExcNodeList={bad} " in run.state(job) for job in (second, third))
    assert f"preflight: {bad} is unfit: {folder} has 0.00 GB free" in run.said()
    slurm.wait(lambda: "JobState=COMPLETED" in run.state(third), 60, "the end of the chain")

    spare = Launched(slurm, tmp_path / "spare", steps=30, cluster=cluster)
    spare.submit("--spares", "1")
    spare.until_over(0)
    assert len(spare.starts()) == 1 and spare.nodes() == [bad, *others]
    assert "goes on with spare nodes" in spare.said() and spare.json("launch/preflight.json")["chosen"] == others
    assert spare.losses() == run.losses()

    short = Launched(slurm, tmp_path / "short", steps=30, cluster=cluster, parallel={})
    short.submit("--nodes", "3", "training.global_batch_size=6")
    short.until_over(5)
    assert f"unfit ({bad}" in short.json("launch/over.json")["reason"] and len(short.starts()) == 1


def test_a_start_that_was_cut_off_gives_way_to_the_next(slurm, tmp_path: Path) -> None:
    """The node's slurmd dies; its batch script and rank live on beside those of the next start, elsewhere."""
    run = Launched(slurm, tmp_path, steps=50_000, parallel={})
    run.submit("--nodes", "1")
    run.until_step(5)
    job, (cut,) = run.jobs()[0], run.nodes()
    old = run.json("owner.json")["pid"]
    slurm.kill_slurmd(cut)
    slurm.call("scontrol", "update", f"nodename={cut}", "state=down", "reason=test")
    run.until_started(2)
    assert run.nodes() != [cut]
    slurm.wait(lambda: not os.path.exists(f"/proc/{old}/exe"), PATIENCE, "the end of the old rank")
    slurm.wait(lambda: "another start goes on with the run" in run.said(), PATIENCE, "the end of the old script")
    run.until_step(run.step() + 20)
    assert run.launch("cancel", str(run.folder)).returncode == 0
    run.until_over(3)
    assert run.json("outcome.json")["step"] == run.step() == run.saved()
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, run.step() + 1))
    assert len(run.starts()) == 2 and [end["next"] for end in run.ends()] == ["over"]
    assert "Restarts=1" in run.state(job)
    slurm.start_node(cut, "-b")
    slurm.resume()
