"""Two sides: a rank on the CPU, and one on the GPU; where there is none, on what looks like one
(`tests.cuda_look_alike`). What needs a real one is marked ``gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from parallel.testing import RankPool


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, and not what looks like one")


def pytest_report_header() -> str:
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; tests/cuda_look_alike"
    return f"GPU of tests/gpu: {found}"


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session")
def side() -> Iterator[Callable]:
    """``side(device, function, ...)``: what `tests.gpu.on_a_side:function` answers in a process that has ``cpu`` or
    ``cuda`` alone. ``fresh=True`` takes a new process."""
    pools: dict[str, RankPool] = {}

    def run(device: str, function: str, *args, fresh: bool = False, **kwargs):
        alike = device == "cuda" and not torch.cuda.is_available()
        if fresh and device in pools and not alike:  # which has no library that reads its environment once
            pools.pop(device).close()
        if device not in pools:
            pools[device] = RankPool(1, timeout=400, prepare="tests.cuda_look_alike:install" if alike else None)
        with pytest.MonkeyPatch.context() as environment:
            if device == "cpu":  # its process inherits this when it starts
                environment.setenv("CUDA_VISIBLE_DEVICES", "")
            (answer,) = pools[device].run(f"tests.gpu.on_a_side:{function}", *args, **kwargs)
        return answer

    yield run
    for pool in pools.values():
        pool.close()
