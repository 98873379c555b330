"""The router: gates, and value and gradient of both losses against fp64."""

from __future__ import annotations

import math

import pytest
import torch

from moe_train.model.config import RouterConfig
from tests import reference_jetmoe as reference

SEQUENCES, LENGTH, HIDDEN, EXPERTS = 3, 7, 12, 5


def new_router(topology, top_k: int, **config):
    """A router with loud weights, and a list of what it observes."""
    from moe_train.model.parameters import initialize
    from moe_train.model.router import Router

    router = Router(
        "layers.0.mlp.router", HIDDEN, EXPERTS, top_k, RouterConfig(**config), topology, torch.float32
    )
    initialize(router.weight, seed=5, std=0.5)
    seen: list = []
    router.observe = seen.append
    return router, seen


def new_tokens(rows: int = LENGTH):
    """``[rows * B, H]``, and how they lie when the sequences are LENGTH long."""
    from moe_train.model.router import Tokens

    x = torch.randn(rows * SEQUENCES, HIDDEN, generator=torch.Generator().manual_seed(2))
    return x.requires_grad_(), Tokens(SEQUENCES, LENGTH, 0)


def reference_losses(x_th: torch.Tensor, weight: torch.Tensor, top_k: int, scope: str):
    """(gates [T, E], balance, z, x, weight) in fp64; rows of x are ``[S, B]``, the reference's ``[B, S]``."""
    x, weight = x_th.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    x_bsh = x.view(-1, SEQUENCES, HIDDEN).transpose(0, 1)
    gates, balance, z = reference.route(x_bsh, weight, top_k, scope)
    return gates.transpose(0, 1).flatten(0, 1), balance, z, x, weight


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_gates_are_a_softmax_over_the_kept(topology, top_k):
    router, _ = new_router(topology, top_k)
    x, tokens = new_tokens()
    gates, experts, _ = router(x, tokens)
    expected, *_ = reference_losses(x, router.weight, top_k, "micro_batch")
    assert gates.shape == experts.shape == (len(x), top_k)
    assert torch.equal(gates, gates.sort(dim=1, descending=True).values), "slot 0 is not the largest"
    dense = torch.zeros(len(x), EXPERTS).scatter(1, experts, gates.detach())
    torch.testing.assert_close(dense.double(), expected.detach(), atol=1e-6, rtol=0)
    if top_k == 1:
        assert torch.equal(gates, torch.ones_like(gates))


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("balance_coef, z_coef", [(0.7, 0.0), (0.0, 0.3), (0.7, 0.3)])
def test_losses_and_their_gradients(topology, scope, top_k, balance_coef, z_coef):
    router, seen = new_router(topology, top_k, scope=scope, load_balancing_coef=balance_coef, z_coef=z_coef)
    x, tokens = new_tokens()
    gates, *_ = router(x, tokens)
    (gates.sum() * 0).backward()  # nothing but the router's own losses is left
    expected_gates, balance, z, x64, weight64 = reference_losses(x, router.weight, top_k, scope)
    (balance_coef * balance + z_coef * z + expected_gates.sum() * 0).backward()
    observed_balance, observed_z, counts, *_ = seen[0]
    assert observed_balance.item() == pytest.approx(balance.item(), rel=1e-5)
    assert observed_z.item() == pytest.approx(z.item(), rel=1e-5)
    assert counts.tolist() == (expected_gates > 0).sum(0).tolist()
    for grad, expected in ((router.weight.grad, weight64.grad), (x.grad, x64.grad)):
        if top_k < EXPERTS or z_coef:  # with every expert chosen the load is even whatever the router says
            assert expected.abs().max() > 1e-4
        torch.testing.assert_close(grad.double(), expected, atol=1e-6, rtol=1e-4)


def test_the_scopes_differ(topology):
    values = {}
    for scope in ("micro_batch", "sequence"):
        router, seen = new_router(topology, 2, scope=scope)
        router(*new_tokens())
        values[scope] = seen[0][0].item()
    assert abs(values["micro_batch"] - values["sequence"]) > 5e-3


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_padding_takes_no_part_in_the_losses(topology, scope):
    """Rows beyond the sequences' length: they are routed, but neither counted nor pushed."""
    router, seen = new_router(topology, 2, scope=scope)
    x, tokens = new_tokens()
    router(x, tokens)
    padded = torch.cat([x.detach(), 9 * torch.ones(2 * SEQUENCES, HIDDEN)]).requires_grad_()
    gates, *_ = router(padded, tokens)
    (gates.sum() * 0).backward()
    for whole, other in zip(*(figures[:3] for figures in seen)):
        assert torch.equal(whole, other)
    assert padded.grad[: len(x)].abs().min() > 0 and padded.grad[len(x) :].abs().max() == 0


def test_balanced_load_costs_one(topology):
    """Eight tokens that go two by two to their own pair of experts, with even probabilities."""
    from moe_train.model.router import Router, Tokens

    router = Router("router", 4, 4, 1, RouterConfig(), topology, torch.float32)
    with torch.no_grad():
        router.weight.copy_(1e-4 * torch.eye(4))
    seen: list = []
    router.observe = seen.append
    router(torch.eye(4).repeat(2, 1), Tokens(2, 4, 0))
    assert seen[0][0].item() == pytest.approx(1.0, abs=1e-4)
    assert seen[0][1].item() == pytest.approx(math.log(4) ** 2, abs=1e-3)


def test_no_losses_outside_of_training(topology):
    router, seen = new_router(topology, 2)
    x, tokens = new_tokens()
    with torch.no_grad():
        router(x, tokens)
    router.eval()
    gates, *_ = router(x, tokens)
    (gates.sum() * 0).backward()
    assert not seen and router.weight.grad.abs().max() == 0
