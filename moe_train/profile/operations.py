"""What ran and what waited, by name: the costliest kernels of a profile, and where the host waited for the GPU."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from moe_train.profile.parts import PREFIX, events_with_parts

OWN = "profile: wait"
"""The range in which the profile itself waits for the GPU: that is none of the step's."""

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls of the CUDA runtime that return when the GPU is done; a copy to the host, `item`, `tolist`, `nonzero` end in
the first."""
WOULD_WAIT = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
"""On a CPU: operations that would. Copies of whole tensors to the host cannot be told from others there."""
FUSED_ADAMW = "aten::_fused_adamw_"
"""Reads its count of steps as a number on a CPU alone: there it says nothing about a GPU."""


def costliest(events, gpu: bool, steps: int, count: int = 60) -> list[dict[str, float | str]]:
    """The kernels (on a CPU the operations) of a finished profile with most time: name, milliseconds and calls of one
    step."""
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        if gpu:
            if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
                continue
            spent = event.time_range.elapsed_us()
        else:
            if event.device_type != torch.autograd.DeviceType.CPU or event.name.startswith((PREFIX, OWN)):
                continue
            spent = event.self_cpu_time_total
        seconds[event.name] += spent
        calls[event.name] += 1
    first = sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]
    return [
        {"name": name, "milliseconds": round(seconds[name] / 1e3 / steps, 4), "calls": calls[name] / steps}
        for name in first
    ]


def write_costliest(events, gpu: bool, steps: int, path: Path) -> None:
    """The same as a file: milliseconds and calls of one step, and the kernel's whole name, which tells its
    precision."""
    lines = ["ms of a step  calls  " + ("kernel" if gpu else "operation")]
    lines += [f"{row['milliseconds']:13.3f}  {row['calls']:5g}  {row['name']}" for row in costliest(events, gpu, steps)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def host_waits(events, gpu: bool, steps: int) -> dict[str, float]:
    """How often a step has the host wait, by operation and part of the model: ``{"aten::item in router": 24.0}``."""
    named, apart = (WAITS, (OWN,)) if gpu else (WOULD_WAIT, (OWN, FUSED_ADAMW))
    waits: Counter[str] = Counter()
    for event, part in events_with_parts(events):
        if event.name in named and not _within(event, apart):
            waits[f"{_operation(event)} in {part}"] += 1
    return {name: count / steps for name, count in waits.most_common()}


def _within(event, names: tuple[str, ...]) -> bool:
    while event is not None:
        if event.name in names:
            return True
        event = event.cpu_parent
    return False


def _operation(event) -> str:
    """The outermost operation of torch that the event is part of, or the event's own name."""
    name = event.name
    while event is not None:
        if event.name.startswith(PREFIX):
            break
        if event.name.startswith("aten::"):
            name = event.name
        event = event.cpu_parent
    return name


def waiting_lines(step: Callable[[], None], root: Path) -> dict[str, int]:
    """The lines of Python at which one call of ``step`` has the host wait for the GPU, and how often; nothing without a
    GPU.

    Files below ``root`` are named from there. Torch warns of what it knows to wait: not of what others, such as NCCL,
    wait for.
    """
    gpu = torch.cuda.is_available()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if gpu:
                torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{_name_from(root, warning.filename)}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message)
    )
    return dict(lines.most_common())


def _name_from(root: Path, filename: str) -> str:
    return os.path.relpath(filename, root) if Path(filename).is_relative_to(root) else filename
