"""Ranks that whole test sessions share: starting them and importing megatron-core costs seconds. And what two workers
of pytest-xdist do at the same time: much of it waits, or computes on one core."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from parallel.testing import RankPool

FIRST = ("launch", "ranks")


@lru_cache(None)
def share(file: str) -> str:
    """What stays together on one worker: the tests of the launcher, who share a Slurm; those on the shared ranks; else
    the tests of a file."""
    if "launch" in Path(file).parts:
        return "launch"
    on_ranks = re.search(r"def \w+\([^)]*\branks\b", (Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
    return "ranks" if on_ranks else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hands shares out, one after another, to whoever has none left."""
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share(nodeid.partition("::")[0])

    return Shares(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest shares come first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        shares = {item: share(item.nodeid.partition("::")[0]) for item in items}
        items.sort(key=lambda item: FIRST.index(shares[item]) if shares[item] in FIRST else len(FIRST))


def _pools(prepare: str | None = None) -> Iterator[Callable[[int], RankPool]]:
    """Pools by their number of ranks, each started at its first use; ``prepare`` is what its ranks call first."""
    pools: dict[int, RankPool] = {}

    def pool(nproc: int) -> RankPool:
        if nproc not in pools:
            pools[nproc] = RankPool(nproc, prepare=prepare)
        return pools[nproc]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def ranks():
    """``ranks(n)``: a pool of n ranks."""
    yield from _pools()


@pytest.fixture(scope="session")
def gpu_ranks():
    """``gpu_ranks(n)``: the same, each with what looks like a GPU."""
    yield from _pools("tests.cuda_look_alike:install")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 server on loopback, moto's."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, request) -> str:
    """The URL of a place of its own in an object store that this process and what it starts can reach."""
    import boto3

    keys = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**keys, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="runs")
    return f"s3://runs/{abs(hash(request.node.nodeid))}"
