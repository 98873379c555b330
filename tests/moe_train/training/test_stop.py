"""What a start leaves behind that is stopped while it loads, with nobody above its rank, as under srun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.integration import runs

OLD = {
    "code": 0,
    "reason": "complete",
    "step": 7,
    "started": "2026-01-01T00:00:00.000+00:00",
    "ended": "2026-01-01T01:00:00.000+00:00",
}


@pytest.fixture
def loading(tmp_path):
    """A rank that has begun to load, in the folder of an earlier start."""
    runs.write_corpora(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "outcome.json").write_text(json.dumps(OLD))
    (folder / "stop").touch()  # the request that the earlier start obeyed
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "moe_train",
            "pretrain",
            str(tmp_path / "run.yaml"),
            "parallel.expert=1",
            "training.max_steps=3",
        ],
        env={**os.environ, **rank, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 60
    while (folder / "stop").exists():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    yield process, folder
    process.kill()
    process.wait()


def test_a_signal_while_loading_leaves_an_outcome_of_its_own(loading) -> None:
    process, folder = loading
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    outcome = runs.outcome(folder)
    assert process.returncode == 3, said
    assert (
        outcome["code"] == 3
        and "SIGTERM before the first step" in outcome["reason"]
        and outcome["started"] > OLD["ended"]
    )


def test_a_stop_while_loading_is_obeyed_and_recorded(loading) -> None:
    process, folder = loading
    (folder / "stop").touch()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 3 and runs.outcome(folder)["step"] == 1, said
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["kind"] == "stop"] == ["file stop"]
