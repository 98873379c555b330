"""Two starts of one run at the same time: the newer has the folder, the older ends and writes nothing
more."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from moe_train.checkpoint.folder import POINTER, checkpoint_name, checkpoints
from moe_train.training.fence import owner_of
from tests.integration import runs
from tests.integration.warm import WarmStart

OPTIONS = ("parallel.expert=1", "checkpoint.interval=2 steps")


def wait_for(condition, seconds: float = 120.0, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(pause)


def test_a_start_that_hung_wakes_up_to_another_one(tmp_path) -> None:
    runs.write_corpora(tmp_path)
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    first = runs.start(tmp_path, *OPTIONS, nproc=1)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    code, said = overtake(tmp_path, first, owner_of(folder).pid)
    assert code == 6 and "was taken over by start 2" in said
    assert [line["step"] for line in runs.metrics(folder)] == list(range(1, runs.outcome(folder)["step"] + 1))
    assert checkpoints(folder / "checkpoints")[-1].name == checkpoint_name(runs.outcome(folder)["step"])


def test_so_does_one_that_hung_while_it_loaded(tmp_path) -> None:
    runs.write_corpora(tmp_path)
    folder = tmp_path / "run"
    assert runs.run(tmp_path, *OPTIONS, "training.max_steps=4", nproc=1)[0] == 0
    pointer = folder / "checkpoints" / POINTER
    pointer.unlink()  # whoever has found the checkpoint, and is about to load it, makes it again
    first = runs.start(tmp_path, *OPTIONS, nproc=1)
    wait_for(pointer.exists, pause=0)
    code, said = overtake(tmp_path, first, owner_of(folder).pid)
    assert code == 6 and "was taken over by start 3" in said


def overtake(folder: Path, first: WarmStart, rank: int) -> tuple[int, str]:
    """Have another start of the run come to its end while the process ``rank`` of ``first`` hangs; the status of
    ``first`` and what it said, having changed nothing of the run."""

    def files() -> dict[str, bytes]:
        found = {str(path): path.read_bytes() for path in (folder / "run").glob("*.*") if path.is_file()}
        return found | {str(path): b"" for path in checkpoints(folder / "run" / "checkpoints")}

    os.kill(rank, signal.SIGSTOP)
    try:
        code, said = runs.run(folder, *OPTIONS, nproc=1)
        assert code == 0 and "taking over from start" in said
        after = files()
    finally:
        os.kill(rank, signal.SIGCONT)
    said, _ = first.communicate(timeout=60)
    assert files() == after and runs.outcome(folder / "run")["code"] == 0
    return first.returncode, said
