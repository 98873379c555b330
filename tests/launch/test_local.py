"""`launch local`: the run is started again after a failure, and not when that would change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.launch import runs

ROOT = Path(__file__).parents[2]


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moe_train", "launch", "local", str(path), "--nproc", "1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(folder: Path, name: str) -> list[dict]:
    path = folder / "run" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_rank_is_started_again_and_the_run_completes(tmp_path: Path) -> None:
    process = start(runs.write_run(tmp_path, steps=300))
    owner = tmp_path / "run/owner.json"
    end = time.monotonic() + 300
    while len(records(tmp_path, "metrics.jsonl")) < 20:
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.kill(json.loads(owner.read_text())["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "restart 1" in said and "resumed from" in said
    assert [line["step"] for line in records(tmp_path, "metrics.jsonl")] == list(range(1, 301))
    notes = records(tmp_path, "launch/starts.jsonl")
    assert [note["next"] for note in notes if note["kind"] == "end"] == ["start", "over"]


def test_a_mistake_is_not_started_again(tmp_path: Path) -> None:
    path = runs.write_run(tmp_path)
    (tmp_path / "web.bin").unlink()
    process = start(path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "web.bin" in said and "restart 1" not in said
