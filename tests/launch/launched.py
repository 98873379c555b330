"""A run that was submitted to the tests' Slurm as users submit theirs, and what became of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.launch import runs
from tests.launch.slurm_cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
CLUSTER = {"env": {"OMP_NUM_THREADS": 1}, "max_restarts": 1, "warning": "40s", "preflight": None}
PATIENCE = 900
"""Seconds for whatever happens within seconds on a machine that has nothing else to do."""


class Launched:
    """A run in a folder of its own: two nodes with one rank each, experts over both, unless `sections` say
    otherwise."""

    def __init__(
        self, slurm: SlurmCluster, folder: Path, *, steps: int = 60, cluster: dict | None = None, **sections: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.slurm, self.folder = slurm, folder / "run"
        self.path = runs.write_run(
            folder, CLUSTER | (cluster or {}), steps=steps, **({"parallel": {"expert": 2}} | sections)
        )

    def launch(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe_train", "launch", verb, *arguments]
        environment = {**self.slurm.environment, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, env=environment, cwd=self.folder.parent, capture_output=True, text=True, timeout=PATIENCE
        )

    def submit(self, *arguments: str) -> None:
        done = self.launch("slurm", str(self.path), *arguments)
        assert done.returncode == 0, done.stderr
        assert "submitted job" in done.stdout

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def lines(self, name: str) -> list[dict]:
        path = self.folder / name
        if not path.exists():
            return []
        whole, _, _ = path.read_text().rpartition("\n")  # what follows is being written
        return [json.loads(line) for line in whole.splitlines()]

    def jobs(self) -> list[str]:
        return [record["job"] for record in self.lines("launch/jobs.jsonl")]

    def step(self) -> int:
        return len(self.lines("metrics.jsonl"))

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return int((self.folder / "checkpoints/latest_checkpointed_iteration.txt").read_text())

    def starts(self) -> list[dict]:
        return [each for each in self.lines("launch/starts.jsonl") if each["kind"] == "start"]

    def ends(self) -> list[dict]:
        return [each for each in self.lines("launch/starts.jsonl") if each["kind"] == "end"]

    def nodes(self) -> list[str]:
        """Of the newest start."""
        return self.slurm.call("scontrol", "show", "hostnames", self.starts()[-1]["nodes"]).split()

    def until_step(self, step: int) -> None:
        self.slurm.wait(lambda: self.step() >= step, PATIENCE, lambda: f"step {step}: {self.said()}")

    def until_started(self, times: int) -> None:
        self.slurm.wait(lambda: len(self.starts()) >= times, PATIENCE, lambda: f"start {times}: {self.said()}")

    def until_over(self, code: int) -> None:
        self.slurm.wait((self.folder / "launch/over.json").exists, PATIENCE, lambda: f"the end: {self.said()}")
        assert self.json("launch/over.json")["code"] == code, self.said()

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("logs/slurm-*.out")))

    def losses(self) -> list[tuple]:
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.lines("metrics.jsonl")]

    def state(self, job: str) -> str:
        """What Slurm says of a job, on one line."""
        return self.slurm.call("scontrol", "show", "job", "-o", job)

    def warn(self, job: str) -> None:
        """The signal that Slurm sends before the time limit, now."""
        self.slurm.call("scancel", "--batch", "--signal=USR1", job)
