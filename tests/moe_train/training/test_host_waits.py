"""How often the host waits for the GPU in a step, as docs/gpu.md says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_train.model.config import RouterConfig
from moe_train.model.depth_config import DepthConfig
from tests.integration.runs import write_corpora

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


def waits_in_the_loop(folder: str) -> list[str]:
    """From forward to update of the second step of a run, with all that is logged of it."""
    from moe_train.config import load_run
    from moe_train.training import loop
    from moe_train.training.trainer import Trainer
    from parallel import engine
    from tests.cuda_look_alike.host_waits import host_waits

    run = load_run(Path(folder) / "run.yaml", [])
    trainer = Trainer(run, engine.start(run.layout(2), seed=1), "never")
    nobody_stops = SimpleNamespace(reason=lambda: None)
    for _ in range(2):
        with host_waits() as waits:
            figures = loop._gradients(trainer, trainer.next_batch_size(), nobody_stops)
            trainer.optimizer.update(1e-3, figures.gradient_norm)
    trainer.close()
    return waits


def test_waits_of_all_that_is_logged(gpu_ranks, tmp_path) -> None:
    write_corpora(tmp_path)
    (waits, _) = gpu_ranks(2).run("tests.moe_train.training.test_host_waits:waits_in_the_loop", str(tmp_path))
    assert dict(Counter(waits)) == {
        **STEP,
        COUNTS: 2 * 2,  # two layers, one micro-batch
        "Event.synchronize in moe_train/training/slow_ranks.py:seconds": 1,
        "tensor in moe_train/training/loop.py:_gradients": 1,
        "to in moe_train/training/loop.py:_gradients": 1,
    }
