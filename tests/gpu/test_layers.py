"""Transformer Engine's layers against ours, one by one: output, and gradients of inputs and weights."""

from __future__ import annotations

import pytest

from tests.gpu.comparisons import distance

KINDS = ["norm", "column", "row", "grouped", "attention"]
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}
TF32 = 2e-3
"""Transformer Engine multiplies fp32 matrices so, whatever torch is told."""


def compare(side, kind: str, found: dict, wanted: dict) -> dict[str, float]:
    """Relative distance of each tensor of two answers of `tests.gpu.on_a_side.layer`."""
    (first, second) = (side(each.pop("device"), "layer", kind, **each) for each in (dict(found), dict(wanted)))
    assert first.keys() == second.keys() and "out" in first and "grad_0" in first
    assert ("grad_weight" in first) == (kind != "attention")
    return {name: distance(first[name].reshape(second[name].shape), second[name]) for name in second}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformer_engine(side, kind, precision) -> None:
    pytest.importorskip("transformer_engine")
    if kind == "attention" and precision == "fp32":
        pytest.skip("its fused attention takes no fp32")
    ours = {"device": "cuda", "kernels": "torch", "precision": precision}
    apart = compare(side, kind, {**ours, "kernels": "transformer_engine"}, ours)
    assert max(apart.values()) <= (TF32 if precision == "fp32" and kind != "norm" else TOLERANCE[precision]), apart


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_fp32_on_a_cpu(side, kind, device, precision) -> None:
    apart = compare(
        side,
        kind,
        {"device": device, "kernels": "torch", "precision": precision},
        {"device": "cpu", "kernels": "torch", "precision": "fp32"},
    )
    assert max(apart.values()) <= TOLERANCE[precision], apart
    assert (max(apart.values()) > TOLERANCE["fp32"]) == (precision == "bf16"), apart
