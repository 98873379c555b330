"""One start at a time writes a run's folder: the newest. Needs no torch.

A requeued job can come to life while its earlier incarnation still hangs on another node, and people start
things twice. Every start takes a number in ``owner.json``, one more than the last, and looks whether it still
has the folder before it commits a checkpoint and before each line of metrics. Who has lost it ends with
status 6 and writes nothing more.

    fence = Fence.take(Path("runs/demo"))
    fence.check()       # FencedError once another start has taken the folder
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moe_train.errors import PolicyStop
from moe_train.training.run_folder import RunFolder, locked, now, write_atomically

OWNER, LOCK = "owner.json", "owner.lock"


class FencedError(PolicyStop):
    """Another start has taken the run's folder."""


@dataclass(frozen=True)
class Owner:
    """Who writes the folder: ``number`` counts the starts that did; ``born`` tells a process from a later one
    with the same id."""

    number: int
    job: str | None
    restart: int
    host: str
    pid: int
    parent: int
    born: int | None
    started: str
    ended: str | None = None

    def describe(self) -> str:
        """One line for people."""
        job = f"job {self.job}, restart {self.restart}, " if self.job else ""
        return f"start {self.number} ({job}process {self.pid} on {self.host}, since {self.started})"

    def may_be_alive(self) -> bool:
        """Whether the process can still be there: known on its own host, not ruled out elsewhere unless it
        said that it ended."""
        return self.ended is None and (
            self.host != socket.gethostname() or (self.born is not None and born(self.pid) == self.born)
        )


class Fence:
    """The right to write a run's folder.

    Attributes:
        owner: this process.
        previous: who had the folder before, None for the first.
    """

    def __init__(self, folder: Path, owner: Owner, previous: Owner | None):
        self.folder, self.owner, self.previous = folder, owner, previous

    @classmethod
    def take(cls, folder: Path, environment: Mapping[str, str] = os.environ) -> Fence:
        """Take ``folder``, whoever has it.

        Raises:
            FencedError: a later incarnation of the same job has it: this one is the one that hung.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job, restart = environment.get("SLURM_JOB_ID"), int(environment.get("SLURM_RESTART_COUNT") or 0)
        with locked(folder / LOCK):
            previous = owner_of(folder)
            if previous and job and previous.job == job and previous.restart > restart:
                raise FencedError(
                    f"{folder} belongs to {previous.describe()}, which came after this one (restart {restart})"
                )
            number = previous.number + 1 if previous else 1
            owner = Owner(
                number,
                job,
                restart,
                socket.gethostname(),
                os.getpid(),
                os.getppid(),
                born(os.getpid()),
                now(),
            )
            _write(folder, owner)
        return cls(folder, owner, previous)

    def check(self) -> None:
        """Raise FencedError unless this process still has the folder."""
        owner = owner_of(self.folder)
        if owner is not None and not self._is_own(owner):
            raise FencedError(
                f"{self.folder} was taken over by {owner.describe()}:"
                f" this one ({self.owner.number}) ends and writes no more"
            )

    def release(self) -> None:
        """Note that this start has ended, if the folder is still its own and can be written."""
        if owner_of(self.folder) == self.owner:
            try:
                _write(self.folder, replace(self.owner, ended=now()))
            except OSError:
                pass  # then the next start says that this one may still run

    def _is_own(self, owner: Owner) -> bool:
        return replace(owner, ended=None) == self.owner


def taken_over(folder: Path, since: str) -> bool:
    """For a first rank, or the process above it: whether somebody else's rank has taken the folder ``since`` its own
    was started."""
    owner = owner_of(folder)
    if owner is None or owner.started < since:
        return False
    return owner.host != socket.gethostname() or os.getpid() not in (owner.pid, owner.parent)


def held_before(folder: Path, since: str, environment: Mapping[str, str] = os.environ) -> bool:
    """For a start that began at ``since`` and ends without having taken the folder: whether another one, as far as can
    be told from here, is still at work in it. An earlier incarnation of the same job is not."""
    owner, job = owner_of(folder), environment.get("SLURM_JOB_ID")
    if owner is None or owner.started >= since or not owner.may_be_alive() or (job and owner.job == job):
        return False
    return (RunFolder(folder).read_outcome().get("ended") or "") < owner.started


def owner_of(folder: Path) -> Owner | None:
    """Who has the folder, None where nobody ever took it."""
    try:
        return Owner(**json.loads((folder / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(folder: Path, owner: Owner) -> None:
    write_atomically(folder / OWNER, json.dumps(asdict(owner), indent=1) + "\n")


def born(pid: int) -> int | None:
    """When a process of this machine was started, in ticks since the machine was; None where there is
    none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
