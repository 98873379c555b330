"""What nvidia-smi says of a node's GPUs, and what of it a run would die of. Needs no torch.

Fields and units are those of ``nvidia-smi --help-query-gpu`` (csv, noheader, nounits: MiB, degrees). A figure that a
GPU or a driver does not have reads ``[N/A]`` or ``[Not Supported]`` and is passed over.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 60
"""It waits for the driver: on a GPU that has fallen off the bus for ever."""
FREE_MIB = 2048
"""Memory that may be in use on a GPU nobody uses: the driver's own."""
RELEASE_SECONDS = 30.0
"""How long processes of an earlier start may take to let go of their GPUs."""

_SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
)


class SmiError(Exception):
    """nvidia-smi is not there, fails or hangs; the message says so."""


def check_gpus(expected: int, release_seconds: float = RELEASE_SECONDS) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with the GPUs of this node, a line each, and what was found (for people).

    Args:
        expected: how many there must be.
        release_seconds: how long to wait for GPUs that are in use.
    """
    try:
        gpus = _query_gpus()
        problems = [] if len(gpus) == expected else [f"{len(gpus)} GPUs instead of {expected}"]
        problems += [problem for gpu in gpus for problem in _broken(gpu)]
        problems += _remapped()
        problems += _in_use(release_seconds)
        driver = next((gpu["driver_version"] for gpu in gpus), None)
        cuda, built = _driver_cuda(), torch_cuda()
        if cuda and built and int(built.split(".")[0]) > int(cuda.split(".")[0]):
            problems.append(f"driver {driver} knows CUDA up to {cuda}, torch is built for {built}")
    except SmiError as error:
        return [str(error)], {}
    names = sorted({gpu["name"] for gpu in gpus})
    return problems, {"gpus": len(gpus), "gpu": ", ".join(names), "driver": driver, "cuda": cuda}


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch is built for, without importing it; None without torch or CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def _query_gpus() -> list[dict[str, str]]:
    # Drivers before 535 call the reasons of lowered clocks by another name, which later ones may drop.
    for prefix in ("clocks_event_reasons", "clocks_throttle_reasons"):
        fields = [*_FIELDS, *(f"{prefix}.{reason}" for reason in _SLOWDOWNS)]
        try:
            rows = _rows(f"--query-gpu={','.join(fields)}")
        except SmiError as error:
            if prefix.startswith("clocks_event") and "not a valid field" in str(error):
                continue
            raise
        names = [*_FIELDS, *_SLOWDOWNS]
        return [dict(zip(names, row)) for row in rows if len(row) == len(names)]
    return []


def _broken(gpu: dict[str, str]) -> Iterator[str]:
    who = f"GPU {gpu['index']}"
    errors = _number(gpu["ecc.errors.uncorrected.volatile.total"])
    if errors:
        yield f"{who}: {errors:.0f} uncorrected ECC errors since the driver was loaded"
    slow = [reason for reason in _SLOWDOWNS if gpu[reason] == "Active"]
    if slow:
        yield f"{who}: clocks are lowered ({', '.join(slow)}, {gpu['temperature.gpu']} degrees)"


def _remapped() -> Iterator[str]:
    """Rows of memory that wait for a reset to be replaced, or that could not be."""
    try:
        rows = _rows("--query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure")
    except SmiError:  # GPUs and drivers that do not remap
        return
    for row in rows:
        if len(row) == 3 and row[1:] != ["No", "No"]:
            pending, failed = (value in ("Yes", "1") for value in row[1:])
            if failed:
                yield f"GPU {row[0]}: replacing a broken row of memory failed"
            elif pending:
                yield f"GPU {row[0]}: needs a reset to replace a broken row of memory"


def _in_use(seconds: float) -> list[str]:
    """GPUs that somebody uses, after up to `seconds` of patience."""
    end = time.monotonic() + seconds
    while True:
        busy = [
            f"GPU {row[0]} is in use by process {row[1]} ({row[2]})"
            for row in _rows("--query-compute-apps=gpu_uuid,pid,process_name")
        ]
        if not busy:
            used = ((gpu, _number(gpu["memory.used"]) or 0) for gpu in _query_gpus())
            busy = [
                f"GPU {gpu['index']}: {mib:.0f} MiB are in use and no process is shown"
                for gpu, mib in used
                if mib > FREE_MIB
            ]
        if not busy or time.monotonic() > end:
            return busy
        time.sleep(2)


def _driver_cuda() -> str | None:
    found = re.search(r"CUDA Version\s*:\s*([\d.]+)", _run())
    return found[1] if found else None


def _rows(query: str) -> list[list[str]]:
    text = _run(query, "--format=csv,noheader,nounits")
    return [[value.strip() for value in row] for row in csv.reader(text.splitlines()) if row]


def _run(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except FileNotFoundError:
        raise SmiError("there is no nvidia-smi") from None
    except subprocess.TimeoutExpired:
        raise SmiError(f"nvidia-smi does not answer within {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise SmiError(f"nvidia-smi ended with status {done.returncode}: {said[0] if said else 'it said nothing'}")
    return done.stdout


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
