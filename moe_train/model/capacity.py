"""How many tokens an expert takes of a micro-batch, and which are left over where that is enforced."""

from __future__ import annotations

import math

import torch

from parallel.topology import Topology


def capacity(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """The most tokens of a micro-batch that one expert takes: ``factor`` times its even share, rounded up."""
    return math.ceil(factor * tokens * top_k / num_experts - 1e-9)  # 1.1 * 100 is to be 110, not 111


def within_capacity(
    experts_tk: torch.Tensor, probability_te: torch.Tensor, limit: int, by: str, valid: int, topology: Topology
) -> torch.Tensor:
    """Which pairs (token, slot) have a place, ``[T, k]`` bool: of each expert the first ``limit`` of the micro-batch.

    The micro-batch lies over the tensor ranks, which exchange what they chose: the result does not depend on their
    number.

    Args:
        experts_tk: the experts of this rank's tokens, which follow those of the tensor rank before in the micro-batch.
        probability_te: ``[T, E]`` the probabilities.
        by: ``position``: first come, first served, in the order of the tokens; ``probability``: the most probable
            first, of two alike the earlier token.
        valid: local rows that are no padding (they come first); padding has no place.
    """
    rows = len(experts_tk)
    chosen_te = torch.zeros_like(probability_te, dtype=torch.bool).scatter_(1, experts_tk, True)
    chosen_te[valid:] = False
    if by == "position":
        place_te = topology.gather_over_tensor_ranks(chosen_te.byte()).cumsum(dim=0, dtype=torch.int64) - 1
    else:
        probability_te = topology.gather_over_tensor_ranks(probability_te.masked_fill(~chosen_te, -1.0))
        place_te = probability_te.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    first = topology.tensor_rank * rows
    kept_tk = place_te[first : first + rows].gather(1, experts_tk) < limit
    kept_tk[valid:] = False
    return kept_tk
