"""Whether what a run must hold at all times fits where it starts: known before anything of it is built.

Activations are left out: only what is certain may refuse a start. `moe-train plan memory` counts them too.
"""

from __future__ import annotations

from pathlib import Path

from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.plan.memory import rank_bytes
from moe_train.plan.quantities import gib
from moe_train.plan.shards import Place, place, places
from parallel.layout import Layout

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Of a container or a job, in bytes, or ``max``."""


def check_host_memory(config: RunConfig, nproc: int) -> None:
    """Raise UserError where ``nproc`` ranks on this machine's CPUs hold more than its memory."""
    layout = config.layout(nproc)
    needed = sum(_held(config, layout, each, gpu=False) for each in places(layout))
    ranks = f"{nproc} processes" if nproc > 1 else "one process"
    _check(needed, host_memory(), f"by {ranks}", "this machine")


def check_gpu_memory(config: RunConfig, layout: Layout, rank: int, memory: int) -> None:
    """Raise UserError where ``rank`` holds more than the ``memory`` (bytes) of its GPU."""
    _check(_held(config, layout, place(layout, rank), gpu=True), memory, "by a rank", "its GPU")


def host_memory() -> int:
    """Bytes that this process and its like can have on this machine."""
    import psutil

    whole = psutil.virtual_memory().total
    try:
        return min(whole, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return whole


def _held(config: RunConfig, layout: Layout, where: Place, gpu: bool) -> int:
    parts = rank_bytes(config, layout, where, overlap=gpu)
    return parts["weights"] + parts["gradients"] + parts["optimizer"]


def _check(needed: int, there: int, by: str, where: str) -> None:
    if needed > there:
        raise UserError(
            f"weights, gradients and optimizer state take {gib(needed)}, held {by}, and {where} has {gib(there)}: "
            "take a smaller model, or a layout and machines that `moe-train plan memory` says are large enough"
        )
