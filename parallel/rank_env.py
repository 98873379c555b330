"""Which rank am I? One answer for ranks that were spawned here, by torchrun, or by srun. Imports no torch."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

# srun numbers its steps from 0; the batch script and an interactive shell have reserved ids from here up.
_FIRST_RESERVED_SLURM_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class RankEnv:
    """The place of this process among the ranks, whoever started it."""

    rank: int
    world_size: int
    local_rank: int
    """Number on this machine: the index of the device."""
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str
    """`env` (torchrun, or spawned by us) or `slurm` (srun)."""

    def variables(self) -> dict[str, str]:
        """The environment variables of torch's `env://` rendezvous."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    def export(self) -> None:
        """Put `variables()` into the environment of this process."""
        os.environ.update(self.variables())


def rank_environment(environ: Mapping[str, str] | None = None) -> RankEnv | None:
    """The rank that the environment describes, or None in a process that nobody started as a rank.

    `RANK` and `WORLD_SIZE` (torchrun and our own spawner) come first, then the variables of an srun step. A Slurm
    batch script has `SLURM_PROCID` and `SLURM_NTASKS` too without being a rank; it is told apart by having no
    numbered step.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = int(env["WORLD_SIZE"])
        return RankEnv(
            rank=int(env["RANK"]),
            world_size=world_size,
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", world_size)),
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(env.get("MASTER_PORT", 29500)),
            launcher="env",
        )
    if _is_slurm_step(env):
        return _slurm_environment(env)
    return None


def _is_slurm_step(env: Mapping[str, str]) -> bool:
    if "SLURM_PROCID" not in env or "SLURM_NTASKS" not in env:
        return False
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < _FIRST_RESERVED_SLURM_STEP


def _slurm_environment(env: Mapping[str, str]) -> RankEnv:
    world_size = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
    tasks = expand_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")))
    node = int(env.get("SLURM_NODEID", 0))
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST", "")))
    job = int(env.get("SLURM_JOB_ID", env.get("SLURM_JOBID", 0)))
    step = int(env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", 0)))
    return RankEnv(
        rank=int(env["SLURM_PROCID"]),
        world_size=world_size,
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        local_world_size=tasks[node] if node < len(tasks) else world_size,
        master_addr=env.get("MASTER_ADDR") or (first_host(hosts) if len(tasks) > 1 else "127.0.0.1"),
        # Below the kernel's range of ephemeral ports, and another one for each job and step that shares a node.
        master_port=int(env.get("MASTER_PORT") or 20000 + (job * 7 + step) % 12000),
        launcher="slurm",
    )


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[03-07,9],x1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        return "127.0.0.1"
    return match[1] + (match[2] or "") + (match[3] or "")


def expand_tasks_per_node(text: str) -> list[int]:
    """Slurm's tasks per node: `8(x2),4` -> [8, 8, 4]."""
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(count)] * int(times or 1)
    return tasks


def free_port() -> int:
    """A port of this machine for ranks to meet at, which nobody has. It is below the range from which the kernel gives
    one to whoever connects: of those it might be taken before the ranks have come to it."""
    # A generator that somebody has seeded would say the same in two processes.
    for port in [*random.SystemRandom().sample(range(20000, 32000), 100), 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("this machine has no free port")
