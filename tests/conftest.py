"""Ranks that whole test sessions share: starting them and importing megatron-core costs seconds."""
from __future__ import annotations

import pytest

from parallel.testing import RankPool


@pytest.fixture(scope="session")
def ranks():
    """``ranks(n)``: a pool of n ranks, started at its first use."""
    pools: dict[int, RankPool] = {}

    def pool(nproc: int) -> RankPool:
        if nproc not in pools:
            pools[nproc] = RankPool(nproc)
        return pools[nproc]

    yield pool
    for each in pools.values():
        each.close()
