"""A run that is killed at random moments, again and again, ends as one that was not.

``KILLS=100 pytest tests/integration/test_kills.py`` for the long form.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import yaml

from tests.integration import runs
from tests.moe_train.checkpoint.test_save import assert_equal, contents

KILLS = int(os.environ.get("KILLS", "2"))
STEPS = 24 + 4 * KILLS
FIGURES = ("step", "tokens", "phase", "loss", "load_balancing_loss", "z_loss", "grad_norm", "lr")
OPTIONS = (
    "training.micro_batch_size=1",
    "training.global_batch_size=2",
    "checkpoint.interval=2 steps",
    "checkpoint.keep_last=2",
    "schedule.warmup=64",
    "schedule.decay=256",
)


def prepare(folder: Path) -> None:
    """The tiny run, long enough for all kills."""
    runs.write_corpora(folder)
    mixture = yaml.safe_load((folder / "mixture.yaml").read_text())
    mixture["sources"]["code"]["max_epochs"] = 1000
    for phase in mixture["phases"]:
        phase["tokens"] = STEPS * 2 * runs.SEQUENCE // 2
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))


def processes_of(start: subprocess.Popen) -> list[int]:
    """The start itself and its ranks."""
    children = Path(f"/proc/{start.pid}/task/{start.pid}/children")
    return [start.pid, *(int(pid) for pid in children.read_text().split())]


def wait_for_a_moment(start: subprocess.Popen, run: Path, number: random.Random) -> None:
    """Some time after the start: before its first step, or a few steps on and then anywhere in a step or a
    save."""
    metrics, before = run / "metrics.jsonl", time.time()
    if number.random() < 0.25:
        time.sleep(number.uniform(0, 6))
        return
    lines = number.randint(1, 4)
    while start.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime > before and metrics.read_text().count("\n") > lines:
            lines, before = lines - 1, metrics.stat().st_mtime
            if lines < 0:
                break
        time.sleep(0.002)
    time.sleep(number.uniform(0, 0.06))


def curve(run: Path) -> list[tuple]:
    return [tuple(line[name] for name in FIGURES) for line in runs.metrics(run)]


def test_killed_again_and_again(tmp_path) -> None:
    number = random.Random(7)
    steady, killed = tmp_path / "steady", tmp_path / "killed"
    prepare(tmp_path)
    code, said = runs.run(tmp_path, *OPTIONS, f"output_dir={steady}")
    assert code == 0, said
    kills, statuses = 0, []
    while kills < KILLS:
        start = runs.start(tmp_path, *OPTIONS, f"output_dir={killed}")
        wait_for_a_moment(start, killed, number)
        if start.poll() is None:
            os.kill(number.choice(processes_of(start)), signal.SIGKILL)
            kills += 1
        said, _ = start.communicate(timeout=60)
        statuses.append(start.returncode)
        assert start.returncode in (-signal.SIGKILL, 5, 0), said
        if start.returncode == 0:
            break
    code, said = runs.run(tmp_path, *OPTIONS, f"output_dir={killed}")
    assert code == 0, said
    print(f"{kills} kills, statuses {sorted(set(statuses))}")
    assert kills == KILLS
    assert curve(killed) == curve(steady)
    last = f"iter_{STEPS:07d}"
    assert_equal(contents(killed / "checkpoints" / last), contents(steady / "checkpoints" / last))
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (steady, killed)]
    assert ledgers[0] == ledgers[1]
    left = {path.name.partition(".")[2] for path in (killed / "checkpoints").glob("iter_*")}
    assert left == {""}  # nothing half done, nothing that was damaged
