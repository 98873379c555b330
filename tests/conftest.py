"""Ranks that whole test sessions share: starting them and importing megatron-core costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

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
