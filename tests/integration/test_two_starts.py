"""Two starts of one run at the same time: the newer has the folder, the older ends and writes nothing
more."""

from __future__ import annotations

import json
import os
import signal
import time

from moe_train.checkpoint.folder import checkpoint_name, checkpoints
from tests.integration import runs

OPTIONS = ("parallel.expert=1", "checkpoint.interval=2 steps")


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_a_start_that_hung_wakes_up_to_another_one(tmp_path) -> None:
    runs.write_corpora(tmp_path)
    folder = tmp_path / "run"
    metrics, owner = folder / "metrics.jsonl", folder / "owner.json"
    first = runs.start(tmp_path, *OPTIONS, nproc=1)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    rank = json.loads(owner.read_text())["pid"]
    os.kill(rank, signal.SIGSTOP)
    try:
        code, said = runs.run(tmp_path, *OPTIONS, nproc=1)
        after = {path.name: path.read_bytes() for path in folder.glob("*.json*") if path.is_file()}
        assert code == 0 and "taking over from start 1" in said
    finally:
        os.kill(rank, signal.SIGCONT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 6 and "was taken over by start 2" in said
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*") if path.is_file()} == after
    outcome = runs.outcome(folder)
    assert outcome["code"] == 0
    assert [line["step"] for line in runs.metrics(folder)] == list(range(1, outcome["step"] + 1))
    assert checkpoints(folder / "checkpoints")[-1].name == checkpoint_name(outcome["step"])
