"""Runs on a real Slurm with virtual nodes: submitted as users do, disturbed as clusters do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs, slurm_cluster = _beside("runs"), _beside("slurm_cluster")
CLUSTER = {"env": {"OMP_NUM_THREADS": 1}, "max_restarts": 1, "warning": "40s"}


@pytest.fixture(scope="module")
def slurm():
    try:
        slurm_cluster.install()
    except slurm_cluster.Unavailable as reason:
        warnings.warn(f"NOTHING IS TESTED ON SLURM: {reason}", stacklevel=1)
        pytest.skip(f"NOTHING IS TESTED ON SLURM: {reason}")
    with slurm_cluster.SlurmCluster(12) as cluster:
        yield cluster


class Launched:
    """A run in a folder of its own, and what became of it."""

    def __init__(self, slurm, folder: Path, *, steps: int = 60, cluster: dict | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        runs.STEPS = steps
        self.slurm, self.folder, self.path = slurm, folder / "run", runs.write_run(folder, CLUSTER | (cluster or {}), parallel={"expert": 2})

    def launch(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe_train", "launch", verb, *arguments]
        environment = {**self.slurm.environment, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, cwd=self.folder.parent, capture_output=True, text=True, timeout=120)

    def submit(self, *arguments: str) -> None:
        done = self.launch("slurm", str(self.path), *arguments)
        assert done.returncode == 0, done.stderr
        assert "submitted job" in done.stdout

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def lines(self, name: str) -> list[dict]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self) -> int:
        return len(self.lines("metrics.jsonl"))

    def starts(self) -> list[dict]:
        return [each for each in self.lines("launch/starts.jsonl") if each["kind"] == "start"]

    def ends(self) -> list[dict]:
        return [each for each in self.lines("launch/starts.jsonl") if each["kind"] == "end"]

    def until_step(self, step: int) -> None:
        self.slurm.wait(lambda: self.step() >= step, 180, f"step {step}: {self.said()}")

    def until_started(self, times: int) -> None:
        self.slurm.wait(lambda: len(self.starts()) >= times, 180, f"start {times}")

    def until_over(self, code: int) -> None:
        self.slurm.wait((self.folder / "launch/over.json").exists, 180, f"the end: {self.said()}")
        assert self.json("launch/over.json")["code"] == code, self.said()

    def said(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("logs/slurm-*.out"))

    def losses(self) -> list[tuple]:
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.lines("metrics.jsonl")]


def warn(run: Launched) -> None:
    """The signal that Slurm sends before the time limit, now."""
    run.slurm.call("scancel", "--batch", "--signal=USR1", run.lines("launch/jobs.jsonl")[-1]["job"])


def test_interrupted_in_every_way_it_ends_as_if_undisturbed(slurm, tmp_path: Path) -> None:
    quiet, run = Launched(slurm, tmp_path / "quiet", steps=100), Launched(slurm, tmp_path / "disturbed", steps=100)
    quiet.submit()
    run.submit("--launch.time=5m", "launch.cluster=" + str(_in_partition(run, "low")))
    refused = run.launch("slurm", str(run.path))
    assert refused.returncode == 2 and "already" in refused.stderr

    run.until_step(10)  # 1. the time is nearly up: saved, requeued, resumed
    warn(run)
    run.until_started(2)
    saved = run.ends()[0]
    assert saved["code"] == 3 and saved["next"] == "requeue" and saved["saved"] >= 10

    run.until_step(saved["saved"] + 10)  # 2. a node loses its power
    lost = slurm.call("scontrol", "show", "hostnames", run.starts()[-1]["nodes"]).split()[-1]
    slurm.power_off(lost)
    slurm.start_node(lost, "-b")
    run.until_started(3)

    before = run.step()  # 3. somebody with more priority wants the nodes
    run.until_step(before + 10)
    slurm.call("sbatch", "-p", "gpu", "--exclusive", f"--nodes={slurm.nodes - 2}", "--output=/dev/null", "--wrap=sleep 1")
    quiet.until_over(0)
    run.until_over(0)

    assert run.losses() == quiet.losses() and len(run.losses()) == 100
    found = json.loads(run.launch("status", "--json", str(run.folder)).stdout)
    assert found["state"] == "complete" and found["step"] == 100 and len(found["restarts"]) == len(run.starts()) - 1 >= 2
    assert "the time was nearly up" in found["restarts"][0]["reason"]
    # Who notices first writes the reason: Slurm that the node has gone, or the ranks that one of them has.
    assert any(words in found["restarts"][1]["reason"] for words in ("node failed", "lost"))
    assert "complete: step 100" in run.launch("logs", str(run.folder), "--follow").stdout


def _in_partition(run: Launched, partition: str) -> Path:
    path = run.path.with_name("low.yaml")
    path.write_text(run.path.with_name("cluster.yaml").read_text() + f"partition: {partition}\n")
    return path


def test_a_mistake_is_not_requeued_and_a_crash_loop_stops(slurm, tmp_path: Path) -> None:
    wrong, crash = Launched(slurm, tmp_path / "wrong"), Launched(slurm, tmp_path / "crash")
    broken = tmp_path / "broken-python"
    broken.write_text("#!/bin/sh\nkill -9 $$\n")
    broken.chmod(0o755)
    alert = tmp_path / "alert"
    alert.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/alerts\n')
    alert.chmod(0o755)
    cluster = crash.path.with_name("cluster.yaml")
    cluster.write_text(cluster.read_text() + f"python: {broken}\nalert_command: {alert}\n")
    crash.submit()
    wrong.submit()
    wrong.path.write_text(wrong.path.read_text().replace("schedule:", "shedule:"))  # edited while it waits
    wrong.until_over(2)
    crash.until_over(6)
    assert len(wrong.starts()) == 1 and "shedule" in wrong.said()
    assert len(crash.starts()) == 2 and [each["next"] for each in crash.ends()] == ["requeue", "loop"]
    assert "crash loop" in crash.json("launch/over.json")["reason"]
    requeued, resumed, over = (tmp_path / "alerts").read_text().splitlines()
    assert "requeued" in requeued and "restart 1: goes on" in resumed and "crash loop" in over
    time.sleep(1)
    assert not [row for row in slurm.call("squeue", "-h", "-t", "PD,R", "-o", "%Z").splitlines() if str(tmp_path) in row]


def test_a_chain_goes_on_and_cancel_saves_first(slurm, tmp_path: Path) -> None:
    run = Launched(slurm, tmp_path / "chain", steps=2000)
    run.submit("--chain", "3")
    first, second, third = (record["job"] for record in run.lines("launch/jobs.jsonl"))
    run.until_step(5)
    warn_job(run, first)
    run.until_started(2)
    assert run.ends()[0]["next"] == "chain" and run.starts()[1]["job"] == second
    run.until_step(run.ends()[0]["saved"] + 5)
    done = run.launch("cancel", str(run.folder))
    assert done.returncode == 0, done.stderr
    run.until_over(3)
    assert run.json("outcome.json")["code"] == 3
    saved = int((run.folder / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert saved == run.step() == run.json("outcome.json")["step"]
    assert "CANCELLED" in slurm.call("squeue", "-h", "-t", "all", "-j", third, "-o", "%T")
    status = run.launch("status", str(run.folder)).stdout
    assert "stopped: cancelled" in status and f"step {saved}" in status


def warn_job(run: Launched, job: str) -> None:
    run.slurm.call("scancel", "--batch", "--signal=USR1", job)


def test_jetmoe_8b_is_accepted_and_wrong_ones_are_told(slurm, tmp_path: Path) -> None:
    environment = {**slurm.environment, "PYTHONPATH": str(ROOT), "DATA": str(tmp_path)}

    def script(**changes: object) -> subprocess.CompletedProcess[str]:
        text = (ROOT / "configs/cluster/h100.yaml").read_text()
        for key, value in changes.items():
            text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{key}:")) + f"\n{key}: {value}\n"
        (tmp_path / "cluster.yaml").write_text(text)
        command = [sys.executable, "-m", "moe_train", "launch", "slurm", "jetmoe_8b", "--dry-run"]
        done = subprocess.run(
            [*command, f"launch.cluster={tmp_path}/cluster.yaml", f"output_dir={tmp_path}/run"],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return subprocess.run(["sbatch", "--test-only"], input=done.stdout, env=environment, capture_output=True, text=True, timeout=60)

    accepted = script(gpu_type="h100")
    assert accepted.returncode == 0 and "to start at" in accepted.stderr, accepted.stderr
    assert script(gpu_type="a100").returncode and script(partition="nowhere").returncode

    run = Launched(slurm, tmp_path / "wrong", cluster={"gpus_per_node": 9})
    for cluster, overrides, said in (
        ({"gpus_per_node": 9}, ("training.global_batch_size=36",), "Slurm refuses the job: Requested node configuration"),
        ({"partition": "nowhere"}, (), "invalid partition specified: nowhere"),
    ):
        run = Launched(slurm, tmp_path / "wrong", cluster=cluster)
        done = run.launch("slurm", str(run.path), "parallel.expert=1", *overrides)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not run.folder.exists()
