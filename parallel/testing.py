"""Run test functions on N ranks that are started once.

Starting an interpreter and importing megatron-core costs seconds a rank, so a pool keeps its ranks, joined in one
process group, and calls one function after another on them; each may form a layout of its own with
:func:`parallel.engine.start`.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys
import traceback
from typing import Any

from parallel.rank_env import free_port


class RankPool:
    """``nproc`` ranks on this machine, over loopback, one thread each.

    Args:
        timeout: seconds that a call may take.
        prepare: ``package.module:function`` that each rank calls when it starts, before anything else.

    Example::

        with RankPool(2) as pool:
            losses = pool.run("tests.layouts:losses", tensor=2)  # one result a rank, in rank order
    """

    def __init__(self, nproc: int, timeout: float = 240.0, prepare: str | None = None):
        self.nproc, self.timeout, self.prepare = nproc, timeout, prepare
        self._ranks: list[tuple[Any, Any]] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, target: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``package.module:function`` on every rank; arguments and results must pickle.

        Raises:
            RuntimeError: with the traceback of the first rank that failed. The pool is started anew for the next call.
        """
        if not self._ranks:
            self._start()
            if self.prepare:
                self.run(self.prepare)
        for _, pipe in self._ranks:
            pipe.send((target, args, kwargs))
        results = []
        for rank, (process, pipe) in enumerate(self._ranks):
            if not pipe.poll(self.timeout):
                self.close()
                raise RuntimeError(f"{target}: rank {rank} gave no answer in {self.timeout:g} s")
            try:
                failed, result = pipe.recv()
            except EOFError:
                failed, result = True, f"rank {rank} died with status {process.exitcode}"
            if failed:
                self.close()
                raise RuntimeError(f"{target} on rank {rank}:\n{result}")
            results.append(result)
        return results

    def close(self) -> None:
        """Kill the ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.nproc):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.nproc, port, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))


def _serve(rank: int, world_size: int, port: int, pipe: Any) -> None:
    """A rank of a pool: answer calls until the pool goes away."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    imported = 0
    while True:
        try:
            target, args, kwargs = pipe.recv()
        except EOFError:
            return
        module, _, function = target.partition(":")
        try:
            answer = False, getattr(importlib.import_module(module), function)(*args, **kwargs)
        except BaseException:
            answer = True, traceback.format_exc()
        pipe.send(answer)
        # Models and groups are left in cycles, and the threads of a group wake up a hundred times a second.
        gc.collect()
        if len(sys.modules) > imported:
            gc.freeze()  # nor need what was imported be looked through each time
            imported = len(sys.modules)
