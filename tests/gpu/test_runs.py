"""Whole steps on a GPU: checkpoints to and from a CPU, how far two runs are apart, and memory."""

from __future__ import annotations

import statistics

import pytest

from tests.gpu.comparisons import spread

gpu = pytest.mark.gpu
DEVICES = ["cpu", "cuda"]
STEPS, MORE = 3, 3  # before the checkpoint and after it
SPREAD = 0.05
"""Of losses of one run twice on a GPU, without `training.deterministic`."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cpu")],
)
def test_a_checkpoint_goes_on_elsewhere(side, tmp_path, saved_on, resumed_on, precision) -> None:
    went_on = side(saved_on, "save", str(tmp_path), STEPS, MORE, precision=precision)
    (checkpoint,) = tmp_path.glob("iter_*")
    resumed = side(resumed_on, "resume", str(checkpoint), STEPS, MORE, precision=precision)
    limit = {"fp32": 1e-4, "bf16": 0.04}[precision] if saved_on != resumed_on else 0.0
    assert resumed == pytest.approx(went_on, rel=limit, abs=0.0)


@pytest.mark.parametrize("kernels", ["torch", "transformer_engine"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("device", DEVICES)
def test_spread_of_two_runs(side, device, deterministic, kernels, record_property) -> None:
    """Bit for bit with `training.deterministic` (on a CPU always), else within a bound. The spread is in the junit
    report."""
    if kernels == "transformer_engine":
        if device == "cpu":
            pytest.skip("Transformer Engine needs a GPU")
        pytest.importorskip("transformer_engine")
    options = dict(precision="bf16", kernels=kernels, deterministic=deterministic)
    # A new process each time: cuBLAS reads the environment once.
    apart = spread([side(device, "curve", 10, fresh=device == "cuda", **options) for _ in range(2)])
    record_property("spread", apart)
    print(f"spread of two runs on {device}, {kernels}, deterministic {deterministic}: {apart:.3g}")
    assert apart == 0.0 if deterministic or device == "cpu" else apart <= SPREAD


WIDE = dict(vocab_size=32000, hidden_size=2048, num_layers=2)


@gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_memory_as_planned(side, recompute, record_property) -> None:
    """Two layers of JetMoE-8B at 4096 tokens: the most that is allocated against what `plan memory` counts."""
    found = side("cuda", "peak", {**WIDE, **side("cpu", "parts_of_the_8b")}, 4096, recompute, fresh=True)
    record_property("measured over planned", found["measured"] / found["planned"])
    print(f"measured over planned, recompute {recompute}: {found['measured'] / found['planned']:.3f}")
    assert found["measured"] == pytest.approx(found["planned"], rel=0.10)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_memory_as_planned_on_a_cpu(side, recompute) -> None:
    """Of the parts that a CPU can tell: the same bound."""
    found = side("cpu", "peak", {}, 256, recompute)
    assert found["measured"] == pytest.approx(found["planned"], rel=0.10)


def test_the_spread_is_the_largest_difference() -> None:
    assert spread([[4.0, 2.0], [4.0, 2.2]]) == pytest.approx(0.2 / statistics.mean([2.0, 2.2]))
