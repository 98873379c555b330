"""Logits, gradients and losses of the GPU against the CPU's of the same model.

What needs no GPU runs the same comparison between a CPU and itself in another precision, so that it is known to work,
and to fail.
"""

from __future__ import annotations

import pytest

from moe_train.model.depth_config import DepthConfig
from tests.gpu.comparisons import BF16, FP32, assert_close, assert_curve_follows, typical_distance
from tests.gpu.on_a_side import model

gpu = pytest.mark.gpu
DEVICES = ["cpu", "cuda"]
STEPS = 12
BF16_CURVE, FP8_CURVE = 0.06, 0.12
"""Of each loss, relative to the CPU's bf16 curve. The model learns four batches by heart, which multiplies small
differences: bf16 and fp32 on a CPU are 0.054 apart, FP8 with scales of whole tensors, emulated on a CPU, 0.07 from
bf16."""


@pytest.fixture(scope="module")
def on_cpu(side) -> dict:
    return side("cpu", "outputs")


@pytest.fixture(scope="module")
def bf16_curve(side) -> list[float]:
    return side("cpu", "curve", STEPS, precision="bf16")


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("device", DEVICES)
def test_fp32(side, on_cpu, device, recompute) -> None:
    assert_close(side(device, "outputs", recompute=recompute), on_cpu, FP32)


@pytest.mark.parametrize("device", DEVICES)
def test_fp32_where_tokens_pass_layers_by(side, device) -> None:
    changes = {"depth": DepthConfig(initial_gate=0.5)}
    wanted = side("cpu", "outputs", changes=changes)
    assert_close(side(device, "outputs", changes=changes, recompute="full"), wanted, FP32)
    assert wanted["gradients"]["layers.1.depth_gate.weight"].any()


def test_fp32_with_overlap_as_on_a_gpu(side, on_cpu) -> None:
    assert_close(side("cpu", "outputs", overlap=True), on_cpu, FP32)
    plain, overlapped = (side("cpu", "curve", 8, overlap=overlap) for overlap in (False, True))
    assert_curve_follows(overlapped, plain, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16(side, on_cpu, device) -> None:
    found = side(device, "outputs", precision="bf16")
    assert_close(found, on_cpu, BF16)
    assert typical_distance(found["logits"], on_cpu["logits"]) > FP32.logits, "this was fp32"


def test_bf16_with_transformer_engine(side, on_cpu) -> None:
    pytest.importorskip("transformer_engine")
    assert_close(side("cuda", "outputs", precision="bf16", kernels="transformer_engine"), on_cpu, BF16)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_by_loss(side, bf16_curve, device) -> None:
    assert_curve_follows(side(device, "curve", STEPS, precision="bf16"), bf16_curve, BF16_CURVE)


@pytest.mark.parametrize(
    "recipe", ["delayed", "tensorwise", *(pytest.param(name, marks=gpu) for name in ("blockwise", "mxfp8"))]
)
def test_fp8_by_loss(side, bf16_curve, recipe) -> None:
    pytest.importorskip("transformer_engine")
    reason = side("cuda", "why_not", recipe)
    if reason:
        pytest.skip(reason)
    options = dict(precision="bf16", kernels="transformer_engine", recipe=recipe)
    assert_curve_follows(side("cuda", "curve", STEPS, **options), bf16_curve, FP8_CURVE)
    bf16 = side("cuda", "outputs", precision="bf16", kernels="transformer_engine")
    assert typical_distance(side("cuda", "outputs", **options)["logits"], bf16["logits"]) > 0.005, (
        "these are the logits of bf16"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_chains(side, device, precision) -> None:
    """What `torch.compile` fuses against the same without it. bf16 may be rounded less often."""
    found = side(device, "outputs", precision=precision)
    assert_close(
        found, side(device, "outputs", precision=precision, compiled=False), FP32 if precision == "fp32" else BF16
    )


def test_what_follows_is_compiled_again(side) -> None:
    """Tests share a process."""
    side("cpu", "outputs", compiled=False)
    assert side("cpu", "compiles")


def test_a_difference_is_found(side, on_cpu) -> None:
    with pytest.raises(AssertionError, match="logits"):
        assert_close(side("cpu", "outputs", seed=6), on_cpu, BF16)
    with pytest.raises(AssertionError, match="attention.output.weight"):
        broken = dict(on_cpu["gradients"])
        broken["layers.1.attention.output.weight"] = broken["layers.1.attention.output.weight"] * 0.5
        assert_close({**on_cpu, "gradients": broken}, on_cpu, BF16)
    config = model()
    assert on_cpu["logits"].shape == (2, 128, config.vocab_size)
    assert sum(gradient.size for gradient in on_cpu["gradients"].values()) == config.num_parameters()
    with pytest.raises(AssertionError):
        assert_curve_follows([2.0, 1.0], [2.0, 1.2], 0.05)


def test_a_recipe_needs_a_gpu(side) -> None:
    assert "needs a GPU" in side("cpu", "why_not", "blockwise")
