"""How often the host waits for the GPU from a step's forward to its update, as docs/gpu.md says."""

from __future__ import annotations

from collections import Counter

import pytest

from moe_train.model.config import RouterConfig
from moe_train.model.depth_config import DepthConfig

STEP = {
    "_local_scalar_dense in moe_train/training/step.py:train": 1,
    "_local_scalar_dense in moe_train/training/optimizer.py:gradient_norm": 1,
}
COUNTS = "Event.synchronize in parallel/dispatch/alltoall.py:_wait_for_counts"
TO_LIST = "tolist in parallel/dispatch/rows.py:counts"
ROUTERS = 2 * 4 * 2
"""Two a layer, four layers, two micro-batches."""
GATED = 2 * 2
"""Every other layer, two micro-batches."""
DROPS = {"router": RouterConfig(load_balancing_coef=0.02, drop_by="position", capacity_factor=1.0)}


@pytest.mark.parametrize(
    "layout, model, more",
    [
        ({}, {}, {}),
        ({"expert": 2}, {}, {COUNTS: ROUTERS}),
        ({"expert": 2}, DROPS, {COUNTS: ROUTERS}),
        ({"tensor": 2, "expert": 2}, {}, {COUNTS: ROUTERS}),
        ({}, DROPS, {TO_LIST: ROUTERS}),
        ({}, {"depth": DepthConfig(initial_gate=0.5)}, {"tolist in moe_train/model/depth.py:__init__": GATED}),
    ],
    ids=["alone", "expert 2", "expert 2, capacity", "tensor 2, expert 2", "capacity", "depth"],
)
def test_waits_of_a_step(gpu_ranks, layout, model, more) -> None:
    waits = gpu_ranks(2 if layout else 1).run("tests.steps_on_ranks:waits_of_a_step", layout, model=model)[0]
    assert dict(Counter(waits)) == {**STEP, **more}


@pytest.mark.parametrize("layout, more", [({}, TO_LIST), ({"expert": 2}, COUNTS)], ids=["alone", "expert 2"])
def test_with_transformer_engine(gpu_ranks, layout, more) -> None:
    """Its grouped product takes the counts from the host."""
    pytest.importorskip("transformer_engine")
    run = "tests.steps_on_ranks:waits_of_a_step"
    waits = gpu_ranks(2 if layout else 1).run(run, layout, kernels="transformer_engine")[0]
    assert dict(Counter(waits)) == {**STEP, more: ROUTERS}
