"""``moe-train launch logs``: what a run says, from its folder alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.journal import Journal
from moe_train.errors import UserError
from parallel.spawn import rank_log_path

_POLL_SECONDS = 0.5


def logs(run_dir: str, *, rank: int | None = None, follow: bool = False, tail: int = 100) -> None:
    """Print the last `tail` lines of the run's log (0: all), and with `follow` what comes after, until the run is over.

    A job's own log has what the batch script and rank 0 say; each rank has a file of its own.

    Raises UserError: there is no such log.
    """
    path = find_log(Path(run_dir), rank)
    position = path.stat().st_size
    text = path.read_bytes()[:position].decode(errors="replace").splitlines(keepends=True)
    sys.stdout.write("".join(text[-tail:] if tail else text))
    sys.stdout.flush()
    if follow:
        for part in _following(Path(run_dir), rank, path, position):
            sys.stdout.write(part)
            sys.stdout.flush()


def find_log(run_dir: Path, rank: int | None = None) -> Path:
    """The newest log of the jobs (of a run without jobs: rank 0's), or that of a rank."""
    folder, jobs = run_dir / "logs", Journal(run_dir).jobs()
    found = sorted(folder.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if rank is None and (not found or (jobs and jobs[-1].get("job") is None)):
        rank = 0  # which says on the terminal what it writes there
    if rank is not None:
        path = rank_log_path(folder, rank)
        if path.exists():
            return path
        there = sorted(int(each.stem.partition("_")[2]) for each in folder.glob("rank_*.log"))
        if there:
            raise UserError(f"{run_dir} has no log of rank {rank}; it has ranks {there[0]} to {there[-1]}")
        raise UserError(f"{run_dir} has no log yet; see moe-train launch status {run_dir}")
    return found[-1]


def _following(run_dir: Path, rank: int | None, path: Path, position: int) -> Iterator[str]:
    """What is written from `position` on; goes on in the log of the next job."""
    journal = Journal(run_dir)
    while True:
        over = journal.over() is not None  # before the read: what was written until then is not lost
        with open(path, "rb") as file:
            file.seek(position)
            data = file.read()
        position += len(data)
        if data:
            yield data.decode(errors="replace")
            continue
        newest = find_log(run_dir, rank)
        if newest != path:
            path, position = newest, 0
        elif over:
            return
        else:
            time.sleep(_POLL_SECONDS)
