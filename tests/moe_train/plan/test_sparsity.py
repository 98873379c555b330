"""The sparsity law of arXiv 2501.12370: its values, and what the paper says follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import UserError
from moe_train.plan.sparsity import ABNAR, active_share, at_fixed_size, best_overall, best_size, best_sparsity


@pytest.mark.parametrize(
    ("params", "tokens", "sparsity", "loss"),
    [(1e9, 20e9, 0.0, 2.5657), (1e9, 20e9, 0.75, 2.6284), (8e9, 20e9, 0.75, 2.3544)],
)
def test_unit_values(params: float, tokens: float, sparsity: float, loss: float) -> None:
    assert ABNAR.loss(params, tokens, sparsity) == pytest.approx(loss, abs=5e-5)


def test_active_share() -> None:
    """Eight experts with one active: 4 + 12 active of 4 + 96."""
    assert active_share(0.0) == 1.0
    assert active_share(7 / 8) == pytest.approx(16 / 100)


def test_without_a_limit_on_size_more_sparsity_is_always_better() -> None:
    choices = [best_size(1e20, sparsity) for sparsity in (0.0, 0.5, 0.75, 0.9, 0.95)]
    losses, totals = [choice.loss for choice in choices], [choice.params for choice in choices]
    assert losses == sorted(losses, reverse=True) and totals == sorted(totals)
    assert best_overall(1e20).sparsity == pytest.approx(0.95, abs=1e-3)


def test_at_a_fixed_size_there_is_a_best_sparsity_that_grows_with_size_and_falls_with_budget() -> None:
    """Sections 3 and D.2 say that it falls with the budget (section 6 says the opposite; the law decides)."""
    by_size = [best_sparsity(3e20, params).sparsity for params in (3e8, 1e9, 3e9, 1e10)]
    assert by_size == sorted(by_size) and by_size[0] < 0.5 < by_size[-1]
    by_budget = [best_sparsity(flops, 2e9).sparsity for flops in (3e19, 1e20, 3e20, 1e21)]
    assert by_budget == sorted(by_budget, reverse=True) and by_budget[0] > by_budget[-1]


@given(st.floats(19.5, 21.0), st.floats(8.5, 10.5))
@settings(max_examples=20, deadline=None)
def test_the_best_sparsity_is_no_worse_than_its_neighbours(log_flops: float, log_params: float) -> None:
    flops, params = 10**log_flops, 10**log_params
    best = best_sparsity(flops, params)
    assert best.active_params * best.tokens * 6 == pytest.approx(flops)
    for sparsity in (0.0, 0.3, 0.6, 0.9, max(0.0, best.sparsity - 0.01), min(0.95, best.sparsity + 0.01)):
        assert best.loss <= at_fixed_size(flops, params, sparsity).loss + 1e-9


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
def test_a_sparsity_that_cannot_be_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match="out of range"):
        best_size(1e20, sparsity)


@pytest.mark.parametrize("flops", [1e7, 1e13, 1e20, 1e35])
def test_the_best_size_is_an_optimum_for_any_budget(flops: float) -> None:
    best = best_size(flops, 0.5)
    assert all(best.loss < at_fixed_size(flops, best.params * factor, 0.5).loss for factor in (0.9, 1.1))
