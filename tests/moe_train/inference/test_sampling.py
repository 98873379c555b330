"""Choosing a token from logits."""

from __future__ import annotations

import pytest
import torch

from moe_train.inference.sampling import Sampler, nucleus

LOGITS = torch.tensor([0.1, 2.0, -1.0, 2.5, 0.0]).log_softmax(-1)


def frequencies(count: int = 4000, **how) -> torch.Tensor:
    sampler = Sampler(**how)
    return torch.bincount(torch.tensor([sampler.choose(LOGITS) for _ in range(count)]), minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_probabilities(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies(temperature=temperature) - expected).abs().max() < 0.03


def test_temperature_zero_takes_the_first_of_the_likeliest():
    assert Sampler(0.0).choose(torch.tensor([1.0, 3.0, 3.0, 2.0])) == 1


def test_nucleus_keeps_the_fewest_that_reach_it():
    probability = torch.tensor([0.1, 0.4, 0.2, 0.3])
    for top_p, kept in (
        (1e-9, [1]),
        (0.4, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.75, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        assert nucleus(probability, top_p).nonzero().flatten().tolist() == kept, top_p
    assert frequencies(count=500, top_p=0.6)[[0, 2, 4]].sum() == 0


def test_equals_are_kept_in_the_order_of_their_ids():
    assert nucleus(torch.full((4,), 0.25), 0.5).nonzero().flatten().tolist() == [0, 1]


def test_a_token_without_probability_is_never_chosen():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert {Sampler(seed=seed).choose(logits) for seed in range(50)} == {1}


def test_the_same_seed_draws_the_same():
    draws = [[Sampler(seed=seed).choose(LOGITS) for seed in range(20)] for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) > 1


def test_rounding_elsewhere_rarely_changes_a_choice():
    """Probabilities that differ in the last bits, as those of another layout do."""
    one, other = Sampler(seed=1), Sampler(seed=1)
    logits = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    noise = 1e-6 * torch.randn(2000, 300, generator=torch.Generator().manual_seed(1))
    assert sum(one.choose(a) != other.choose(a + b) for a, b in zip(logits, noise)) <= 1
