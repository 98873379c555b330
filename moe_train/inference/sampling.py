"""From logits to the next token: temperature, nucleus, and a random number that every layout draws alike."""

from __future__ import annotations

import torch


class Sampler:
    """Chooses one token after another.

    The random numbers depend on the seed alone, and a token is found where the cumulative probability, in
    the order of the ids, passes the number: rounding errors of another layout move that place by as little
    as they move the probabilities.

    Args:
        temperature: 0: always the likeliest token, the first of equals.
        top_p: choose among the likeliest tokens that together have this probability (at least one).
        seed: of the random numbers.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0):
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, logits_v: torch.Tensor) -> int:
        """The next token, from its logits ``[V]``. Draws one number, also where nothing is left to chance."""
        number = torch.rand((), generator=self._generator, dtype=torch.float64)
        logits_v = logits_v.detach().double().cpu()
        if self.temperature == 0:
            return int(logits_v.argmax())
        probability = ((logits_v - logits_v.max()) / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            probability = nucleus(probability, self.top_p)
        cumulative = probability.cumsum(dim=-1)
        chosen = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
        return min(chosen, int(probability.nonzero()[-1]))  # rounding at the very end


def nucleus(probability: torch.Tensor, top_p: float) -> torch.Tensor:
    """``probability`` without what is beyond the likeliest tokens that make up ``top_p``; not normalised."""
    ordered, order = probability.sort(descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    beyond = before >= top_p
    beyond[0] = False
    return probability.masked_fill(torch.zeros_like(beyond).scatter_(0, order, beyond), 0.0)
