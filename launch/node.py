"""One node's own part of the preflight: its GPUs, its disks, and its ranks of the test of the network. Needs no
torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from launch.nvidia_smi import check_gpus

_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What the preflight of a job is to look for. Travels to the nodes as JSON."""

    nodes: int
    """That take part; so many are needed of them: `wanted`."""
    wanted: int
    ranks_per_node: int
    gpus: int
    """On each node; 0: the ranks compute on CPUs."""
    notes: str
    """The folder for the verdict."""
    run_dir: str | None = None
    """The run's folder, which the nodes share: it must be writable."""
    disks: tuple[str, ...] = ()
    """The node's own folders that must be writable: its scratch."""
    free_gigabytes: float = 1.0
    clock_skew: float = 5.0
    """Seconds."""
    gigabytes_per_second: float | None = None
    """Of the all-reduce, at least; None: any."""
    timeout: float = 180.0
    """Seconds that a node may take to answer, and that one test of the network may take."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        data = json.loads(text)
        return cls(**{**data, "disks": tuple(data["disks"])})


@dataclass
class Report:
    """What a node says of itself."""

    name: str
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    folder_problem: str | None = None
    """What is wrong with the run's folder; the node's own fault only where the others can write it."""


def check_node(name: str, settings: Settings) -> Report:
    """Look at this machine: GPUs where there are to be some, and disks."""
    report = Report(name)
    if settings.gpus:
        report.problems, report.facts = check_gpus(settings.gpus)
    for folder in settings.disks:
        problem = disk_problem(folder, settings.free_gigabytes)
        report.problems += [problem] if problem else []
    if settings.run_dir:
        report.folder_problem = disk_problem(settings.run_dir, settings.free_gigabytes)
    return report


def disk_problem(folder: str, free_gigabytes: float) -> str | None:
    """What is wrong with a folder that must take files, None where nothing is."""
    try:
        free = shutil.disk_usage(folder).free / 1e9
        if free < free_gigabytes:
            return f"{folder} has {free:.2f} GB free, less than {free_gigabytes:g}"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return None


def test_fabric(
    first_rank: int,
    world_size: int,
    address: str,
    port: int,
    settings: Settings,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run this node's ranks of `parallel.fabric`, until they end, time is up, one fails, or `stopped()`.

    Returns {"figures": those that rank 0 printed, "problem": what went wrong}, each None where there is none.
    """
    device = "cuda" if settings.gpus else "cpu"
    processes, outputs = [], []
    for local in range(settings.ranks_per_node):
        variables = {
            "RANK": first_rank + local,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": settings.ranks_per_node,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        # Into files: with NCCL_DEBUG=INFO it says more than a pipe holds.
        outputs.append(tuple(tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "parallel.fabric", device],
                env={**os.environ, **{key: str(value) for key, value in variables.items()}},
                stdin=subprocess.DEVNULL,
                stdout=outputs[-1][0],
                stderr=outputs[-1][1],
            )
        )
    end, problem = time.monotonic() + settings.timeout, None
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        if stopped():
            problem = "another node failed"
            break
        if time.monotonic() > end:
            problem = f"the exchange did not end within {settings.timeout:g} s"
            break
        time.sleep(0.05)
    figures = None
    for rank, (process, files) in enumerate(zip(processes, outputs), first_rank):
        if running := process.poll() is None:
            process.kill()
        process.wait()
        out, err = (_lines(file) for file in files)
        if process.returncode and not running:
            problem = problem or (err[-1] if err else f"its test ended with status {process.returncode}")
        elif rank == 0:
            figures = next((json.loads(line) for line in out if line.startswith("{")), None)
    return {"figures": figures, "problem": problem}


def _lines(file: IO[str]) -> list[str]:
    """What a process wrote; closes the file."""
    with file:
        file.seek(0)
        return [line.strip() for line in file if line.strip()]
