"""Training in bf16 follows fp32: the demo's model on text, the same data in the same order.

`benchmarks/precision_curve.py` compares whole runs of the demo. There the learning rate lets small differences grow as
another seed's do; here it is so small that they stay small, and that weights in bf16 alone would not move: what is
updated are their fp32 copies.
"""

from __future__ import annotations

import argparse
import inspect
import logging
from pathlib import Path

import pytest
import torch

from moe_train.config import OptimizerConfig, load_model
from parallel import engine
from parallel.layout import Layout

DEMO = Path(__file__).parents[3] / "configs/model/demo.yaml"
LEARNING_RATE, STEPS, SEQUENCE, MICRO_BATCH, GLOBAL_BATCH = 3e-5, 24, 64, 2, 4


def curve(precision: str) -> torch.Tensor:
    """The losses of some steps on Python sources, by bytes."""
    topology = engine.start(Layout(1, 1, 1, None, 1, 1), seed=1)
    from moe_train.model.build import DTYPES, build_model
    from moe_train.model.options import ModelOptions
    from moe_train.training.optimizer import Optimizer, wrap_data_parallel
    from moe_train.training.step import Stepper

    wrapped = wrap_data_parallel(
        build_model(load_model(DEMO), topology, ModelOptions(DTYPES[precision], 1234)), overlap=False
    )
    optimizer = Optimizer(wrapped, OptimizerConfig(lr=LEARNING_RATE), bf16=precision == "bf16")
    stepper = Stepper(wrapped, topology, SEQUENCE, MICRO_BATCH)
    text = "".join(map(inspect.getsource, (argparse, logging))).encode()
    windows = torch.tensor(list(text[: STEPS * GLOBAL_BATCH * (SEQUENCE + 1)])).view(STEPS, GLOBAL_BATCH, SEQUENCE + 1)
    losses = []
    for batch in windows:
        optimizer.zero_grad()
        losses.append(stepper.train(list(batch.split(MICRO_BATCH))) * MICRO_BATCH / GLOBAL_BATCH)
        optimizer.update(LEARNING_RATE, optimizer.gradient_norm())
    # No loss of so few steps tells in what gradients are added up.
    assert {parameter.main_grad.dtype for parameter in wrapped[0].parameters()} == {torch.float32}
    return torch.tensor(losses)


@pytest.fixture
def fp32_and_bf16():
    yield curve("fp32"), curve("bf16")
    engine.stop()


def test_the_curve_in_bf16_is_that_in_fp32(fp32_and_bf16) -> None:
    fp32, bf16 = fp32_and_bf16
    distance = (bf16 - fp32).abs()
    print(f"from {fp32[0]:.2f} to {fp32[-1]:.2f}; distance: mean {distance.mean():.4f}, largest {distance.max():.4f}")
    assert fp32[0] - fp32[-1] > 0.8
    assert distance.mean() < 0.02 and distance.max() < 0.08
