"""The losses that keep a router's experts in balance, by name.

Each gives this rank's part: over the tensor ranks that share a micro-batch the parts, and their gradients, add up to
those of the loss. ``G`` groups of tokens (one micro-batch, or each of its sequences) have a loss each; their mean is
taken.
"""

from __future__ import annotations

import torch

from parallel.topology import Topology


def switch(
    probability_ge: torch.Tensor, counts_ge: torch.Tensor, per_group: int, top_k: int, topology: Topology
) -> torch.Tensor:
    """``E * sum_e f_e P_e`` (Fedus et al.; JetMoE eq. 10), 1 when balanced: f the fraction of the choices, P the mean
    probability.

    Args:
        probability_ge: ``[G, E]`` the probabilities of all experts, summed over this rank's tokens.
        counts_ge: ``[G, E]`` how many tokens of all tensor ranks chose each expert.
        per_group: tokens of one group, over all tensor ranks.
    """
    groups, experts = counts_ge.shape
    return (probability_ge * counts_ge).sum() * (experts / (per_group * per_group * top_k * groups))


def skywork(
    probability_ge: torch.Tensor, counts_ge: torch.Tensor, per_group: int, top_k: int, topology: Topology
) -> torch.Tensor:
    """``sum_e (1/E - P_e)^2`` (Skywork-MoE eq. 3), 0 when the mean probabilities are even. Arguments as of
    :func:`switch`."""
    groups, experts = counts_ge.shape
    mean_ge = probability_ge / per_group
    whole_ge = topology.sum_over_tensor_ranks(mean_ge.detach().clone())
    even_g1 = mean_ge.detach().sum(dim=1, keepdim=True) / experts  # 1 / E times this rank's share of the tokens
    part = ((mean_ge - even_g1) * (whole_ge - 1 / experts)).sum() / groups
    return 2 * part - part.detach()  # a square: its gradient is twice what this linear form has


LOSSES = {"switch": switch, "skywork": skywork}
"""By the value of ``RouterConfig.load_balancing``; there is none for ``none``."""
