"""AdamW on the host: the same curve as on the device, the same state in a checkpoint."""

from __future__ import annotations

import importlib.util

import pytest

from moe_train.training.config import OptimizerConfig

KERNELS = [
    "torch",
    pytest.param(
        "deepspeed",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (extra [deepspeed])"
        ),
    ),
]
TOLERANCE = {"torch": {"fp32": 0.0, "bf16": 0.0}, "deepspeed": {"fp32": 2e-5, "bf16": 1e-2}}
"""torch's kernel is the one that runs without offload on a CPU: bit for bit. DeepSpeed's rounds its own way, and now
and then a bf16 weight with it."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_curve_is_the_same(ranks, kernel, precision):
    ours, expected = (
        ranks(2).run("tests.steps_on_ranks:train", {"expert": 2}, steps=5, precision=precision, offload=offload)[0]
        for offload in (kernel, None)
    )
    assert expected[-1]["loss"] < expected[0]["loss"]
    for step, wanted in zip(ours, expected):
        assert step["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE[kernel][precision], abs=0)
        assert step["norm"] == pytest.approx(wanted["norm"], rel=10 * TOLERANCE[kernel][precision], abs=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_checkpoint_goes_on_either_way(ranks, tmp_path, kernel):
    pool = ranks(2)
    expected = pool.run("tests.steps_on_ranks:save", {}, str(tmp_path), 3, 3, offload=kernel)[0]
    checkpoint = [str(tmp_path / "iter_0000003")]
    with_it, without = (
        pool.run("tests.steps_on_ranks:resume", {}, checkpoint, 3, 3, offload=offload)[0][0]
        for offload in (kernel, None)
    )
    assert [step["loss"] for step in with_it] == [step["loss"] for step in expected]
    for step, wanted in zip(without, expected):
        assert step["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE[kernel]["fp32"], abs=0)


def test_deepspeed_that_is_missing_is_named(monkeypatch):
    import sys

    import torch

    from moe_train.errors import UserError
    from moe_train.training.offload import OffloadedAdamW

    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)
    weight = torch.nn.Parameter(torch.ones(4))
    config = OptimizerConfig(offload="deepspeed")
    with pytest.raises(UserError, match=r"pip install 'moe-train\[deepspeed\]'"):
        OffloadedAdamW(torch.optim.AdamW([weight], lr=1.0), config.offload)
