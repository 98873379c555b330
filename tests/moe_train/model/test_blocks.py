"""Hand-written backwards (norm, rotary embedding, gated MLP) against autograd and formulas in fp64."""

from __future__ import annotations

import pytest
import torch

from tests import reference_jetmoe as reference


def draw(*shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- RMS norm


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_norm_and_its_gradients(topology, size, eps):
    from moe_train.model.norm import RMSNorm

    norm = RMSNorm("final_norm", size, eps, topology, torch.float32)
    with torch.no_grad():
        norm.weight.copy_(draw(size, seed=1))
    x, grad = draw(5, 3, size).requires_grad_(), draw(5, 3, size, seed=2)
    kept = x.detach().clone()
    y = norm(x)
    y.backward(grad)
    x64, w64 = kept.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = reference.rms_norm(x64, w64, eps)
    expected.backward(grad.double())
    assert torch.equal(x.detach(), kept), "the input was written to"
    torch.testing.assert_close(y.detach().double(), expected.detach(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.weight.grad.double(), w64.grad, atol=1e-5, rtol=1e-5)


def test_norm_in_bf16_casts_before_it_scales(topology):
    """The order of JetMoE: normalise in fp32, cast, then multiply by the weight in bf16."""
    from moe_train.model.norm import RMSNorm

    norm = RMSNorm("final_norm", 33, 1e-6, topology, torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(draw(33, seed=1))
    x = draw(40, 33, dtype=torch.bfloat16)
    x32 = x.float()
    normed = x32 * (x32.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, normed.bfloat16() * norm.weight)
    assert not torch.equal(y, (normed * norm.weight.float()).bfloat16()), "the two orders cannot be told apart here"


# --- rotary embedding


def test_rotation_is_the_formula():
    from moe_train.model.rope import rotary_table, rotate

    x = draw(11, 2, 3, 8)  # [S, B, n, d]
    y = rotate(x, rotary_table(torch.arange(11), 8, 500.0, torch.float32))
    expected = reference.rotate(x.double().transpose(0, 1), 500.0).transpose(0, 1)
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(y[0], x[0]), "position 0 does not turn"


def test_rotation_starts_anywhere():
    from moe_train.model.rope import rotary_table, rotate

    x = draw(9, 1, 2, 6)
    whole = rotate(x, rotary_table(torch.arange(9), 6, 1e4, torch.float32))
    tail = rotate(x[5:], rotary_table(torch.arange(5, 9), 6, 1e4, torch.float32))
    assert torch.equal(whole[5:], tail)


@pytest.mark.parametrize("slots", [1, 3])
def test_rotation_backward(slots):
    from moe_train.model.rope import rotary_table, rotate

    table = rotary_table(torch.arange(4), 6, 100.0, torch.float64)
    x = draw(4, 1, slots, 2, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x,))


# --- gated MLP


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_gated_activation(topology, activation):
    from moe_train.model.mlp import gated_activation

    x = draw(5, 14, dtype=torch.float64).requires_grad_()
    gate, up = x.split(7, dim=-1)
    expected = reference.ACTIVATIONS[activation](gate) * up
    torch.testing.assert_close(gated_activation(x, activation), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x: gated_activation(x, activation), (x,))
