"""A run that is killed again and again, at any moment, ends as one that was not.

12 times by default, which takes half a minute; `KILLS=100 make test TESTS=tests/integration/test_kills.py` for a
hundred.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import yaml

from moe_train.checkpoint.folder import POINTER, checkpoints, step_of
from tests.integration import runs
from tests.integration.warm import WarmStart
from tests.moe_train.checkpoint.test_save import assert_equal, contents

KILLS = int(os.environ.get("KILLS", "12"))
STEPS = 40 + 3 * KILLS
FIGURES = ("step", "tokens", "phase", "loss", "load_balancing_loss", "z_loss", "grad_norm", "lr")
OPTIONS = (
    "training.micro_batch_size=1",
    "training.global_batch_size=2",
    "checkpoint.interval=2 steps",
    "checkpoint.keep_last=2",
    "schedule.warmup=64",
    "schedule.decay=256",
    "data.validation=null",
    # Faults are part of what must come out the same: some steps go back to a checkpoint.
    "faults.on_spike=rewind",
    "faults.spike_deviations=1.7",
    "faults.max_skips=1000",
)


def prepare(folder: Path) -> None:
    """The tiny run, long enough for all kills."""
    runs.write_corpora(folder)
    mixture = yaml.safe_load((folder / "mixture.yaml").read_text())
    mixture["sources"]["code"]["max_epochs"] = 1000
    for phase, steps in zip(mixture["phases"], (STEPS - 10, 10)):
        phase["tokens"] = steps * 2 * runs.SEQUENCE
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))


class Life:
    """One start of the run, watched until the moment to kill it."""

    def __init__(self, start: WarmStart, run: Path):
        self.start, self.run = start, run
        self._before = set(os.listdir(run / "checkpoints")) if (run / "checkpoints").exists() else set()
        self._began = time.time()

    def kill_at_random(self, number: random.Random) -> str | None:
        """SIGKILL to the start or one of its ranks; what was aimed at, or None if it ended before."""
        aim = number.choice(("start", "step", "save", "rename"))
        if aim == "start":
            time.sleep(number.uniform(0, 1.0))
        elif aim == "step":
            self._wait_for_steps(number.randint(1, 3))
            time.sleep(number.uniform(0, 0.06))
        elif aim == "save":
            self._wait_for_folder(lambda name: ".writing." in name)
            time.sleep(number.uniform(0, 0.01))
        else:
            self._wait_for_folder(lambda name: "." not in name)
        if self.start.poll() is not None:
            return None
        children = Path(f"/proc/{self.start.pid}/task/{self.start.pid}/children").read_text().split()
        victims = [self.start.pid, *map(int, children)]
        victim = victims[min(1, len(victims) - 1)] if aim == "rename" else number.choice(victims)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return aim

    def _wait_for_steps(self, steps: int) -> None:
        metrics = self.run / "metrics.jsonl"
        seen = -1
        while steps > 0 and self.start.poll() is None:
            if metrics.exists() and metrics.stat().st_mtime > self._began:
                lines = metrics.read_bytes().count(b"\n")
                steps -= seen >= 0 and lines > seen
                seen = lines
            time.sleep(0.002)

    def _wait_for_folder(self, wanted) -> None:
        folder, tries = self.run / "checkpoints", 0
        while tries % 100 or self.start.poll() is None:  # tightly: what is waited for may last a millisecond
            tries += 1
            try:
                new = set(os.listdir(folder)) - self._before
                if any(wanted(name) for name in new if name.startswith("iter_")):
                    return
            except FileNotFoundError:
                time.sleep(0.01)


def what_was_cut(run: Path) -> str:
    """What a killed start was about, by what it left."""
    folder = run / "checkpoints"
    if not folder.exists():
        return "before the first save"
    found, pointer = checkpoints(folder), folder / POINTER
    if found and (not pointer.exists() or int(pointer.read_text()) != step_of(found[-1])):
        return "between rename and pointer"
    return "in a save" if any(".writing." in path.name for path in folder.iterdir()) else "between saves"


def curve(run: Path) -> list[tuple]:
    return [tuple(line[name] for name in FIGURES) for line in runs.metrics(run)]


def test_killed_at_any_moment_it_ends_as_if_undisturbed(tmp_path) -> None:
    number = random.Random(7)
    steady, killed = tmp_path / "steady", tmp_path / "killed"
    prepare(tmp_path)
    undisturbed = runs.start(tmp_path, *OPTIONS, f"output_dir={steady}")
    moments: Counter[str] = Counter()
    while moments.total() < KILLS:
        start = runs.start(tmp_path, *OPTIONS, f"output_dir={killed}")
        aim = Life(start, killed).kill_at_random(number)
        said, _ = start.communicate(timeout=120)
        assert start.returncode in (-signal.SIGKILL, 5), f"{aim}, {moments}: {start.returncode}\n{said}"
        moments[what_was_cut(killed)] += 1
    last = runs.start(tmp_path, *OPTIONS, f"output_dir={killed}")
    for each in (undisturbed, last):
        said, _ = each.communicate(timeout=300)
        assert each.returncode == 0, said
    print(dict(moments))
    assert '"kind": "rewind"' in (steady / "events.jsonl").read_text(), (
        "nothing went back: the test says less than it should"
    )
    assert curve(killed) == curve(steady)
    name = f"iter_{STEPS:07d}"
    assert_equal(contents(killed / "checkpoints" / name), contents(steady / "checkpoints" / name))
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (steady, killed)]
    assert ledgers[0] == ledgers[1]
    assert any(segment["skipped"] for segment in ledgers[0]["segments"])
    left = {path.name.partition(".")[2] for path in (killed / "checkpoints").glob("iter_*")}
    assert left == {""}  # nothing half done, nothing that was damaged
    if KILLS >= 100:
        assert min(moments["in a save"], moments["between saves"]) >= 10
        assert moments["between rename and pointer"] >= 1
