"""Starting the engine: what its groups are told."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path


def timeouts(minutes: int) -> set[timedelta]:
    """Of the groups of this rank that are not the world's, which the pool formed."""
    import torch
    import torch.distributed as dist

    from parallel import engine
    from parallel.layout import Layout

    engine.start(Layout(2, 1, 1, None, 1, 2), seed=1)
    engine.start(Layout(2, 2, 1, None, 2, 1), seed=1, timeout=timedelta(minutes=minutes))
    groups = set(dist.distributed_c10d._world.pg_map) - {dist.group.WORLD}
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_every_group_waits_as_long_as_it_was_told(ranks) -> None:
    """Not half an hour, which is megatron-core's own: a save may take longer."""
    assert ranks(2).run("tests.parallel.test_engine:timeouts", 110) == [{timedelta(minutes=110)}] * 2


def end(note: str, rank_zero_gives_up: bool) -> bool:
    """Rank 0 leaves a note and ends, or does not; whether the note is there when this rank may end."""
    from parallel import engine
    from parallel.layout import Layout

    engine.start(Layout(2, 1, 1, None, 1, 2), seed=1)
    if os.environ["RANK"] == "0":
        time.sleep(0.3)
        if rank_zero_gives_up:
            return False
        Path(note).touch()
    engine.let_rank_zero_end_first(0.1 if rank_zero_gives_up else 60)
    return Path(note).exists()


def test_rank_zero_ends_first(ranks, tmp_path) -> None:
    """And where it never gets there, the others end all the same, and well."""
    assert ranks(2).run("tests.parallel.test_engine:end", str(tmp_path / "note"), True) == [False, False]
    assert ranks(2).run("tests.parallel.test_engine:end", str(tmp_path / "note"), False) == [True, True]
