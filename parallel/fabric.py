"""How fast the ranks exchange data: a short all-reduce and all-to-all over the network that a run will use.

    RANK=.. WORLD_SIZE=.. LOCAL_RANK=.. MASTER_ADDR=.. MASTER_PORT=.. python -m parallel.fabric cuda|cpu

NCCL on GPUs, gloo on CPUs, as in a run. Rank 0 prints one JSON line: ``all_reduce`` and ``all_to_all`` in gigabytes per
second of bus bandwidth (what each rank's link carries, independent of the number of ranks; null for one rank). The sums
are compared with what they must be. Status 5 for a wrong sum or a lost rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

GPU_BYTES, CPU_BYTES = 1 << 28, 1 << 21
WARM_UP, REPEATS = 2, 5
TIMEOUT = timedelta(minutes=5)
"""The parent of the ranks has a limit of its own, which is shorter."""


def measure(cuda: bool) -> dict[str, float | None]:
    """Join the other ranks, exchange, and return the figures.

    Raises:
        RuntimeError: torch has no GPU for this rank, a rank has gone, or a sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if cuda:
        if not torch.cuda.device_count():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU")
        # As the engine of a run takes it: a rank may see all GPUs of its node, or only its own.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    world, rank = dist.get_world_size(), dist.get_rank()
    count = (GPU_BYTES if cuda else CPU_BYTES) // 4 // world * world
    values, received = torch.empty(count, device=device), torch.empty(count, device=device)

    def all_reduce() -> None:
        values.fill_(rank + 1)
        dist.all_reduce(values)

    def all_to_all() -> None:
        dist.all_to_all_single(received, values)

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize()

    reduced = _seconds(all_reduce, synchronize)
    _check(bool((values == world * (world + 1) / 2).all()), "all-reduce", rank)
    values.fill_(rank)
    exchanged = _seconds(all_to_all, synchronize)
    wanted = torch.arange(world, device=device).repeat_interleave(count // world)
    _check(bool((received == wanted).all()), "all-to-all", rank)
    slowest = torch.tensor([reduced, exchanged], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    reduced, exchanged = slowest.tolist()
    share = (world - 1) / world
    return {
        "all_reduce": 2 * share * count * 4 / reduced / 1e9 if world > 1 else None,
        "all_to_all": share * count * 4 / exchanged / 1e9 if world > 1 else None,
    }


def _seconds(exchange: Callable[[], None], synchronize: Callable[[], None]) -> float:
    for _ in range(WARM_UP):
        exchange()
    synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        exchange()
    synchronize()
    return (time.perf_counter() - began) / REPEATS


def _check(right: bool, what: str, rank: int) -> None:
    if not right:
        raise RuntimeError(f"{what} gave rank {rank} wrong values")


def main() -> NoReturn:
    """One rank's part, ended without the interpreter's clean-up, which may wait for peers that have gone."""
    status = 0
    try:
        figures = measure(sys.argv[1:] == ["cuda"])
        if os.environ.get("RANK") == "0":
            print(json.dumps(figures), flush=True)
    except Exception as error:
        print(
            f"rank {os.environ.get('RANK')}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            file=sys.stderr,
            flush=True,
        )
        status = 5
    os._exit(status)


if __name__ == "__main__":
    main()
