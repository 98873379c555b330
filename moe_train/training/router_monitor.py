"""What the routers do in a step: their losses, and how evenly they load the experts."""
from __future__ import annotations

import math

import torch

from moe_train.model.router import Router
from moe_train.model.transformer import Transformer
from parallel.topology import Topology


class RouterMonitor:
    """Adds up what every router of this rank observes over the micro-batches of a step.

    ``totals`` is a flat fp64 vector with a place for every router of the whole model, so that one sum over all ranks
    brings the parts of tensor, pipeline and data ranks together.
    """

    def __init__(self, chunks: list[Transformer], topology: Topology):
        routers = chunks[0].model_config.routers()
        self.names, self.experts = list(routers), list(routers.values())
        self._starts = [0]
        for size in self.experts:
            self._starts.append(self._starts[-1] + 2 + size)
        self.totals = torch.zeros(self._starts[-1], dtype=torch.float64, device=topology.device)
        for chunk in chunks:
            for layer in chunk.layers:
                for part in ("attention", "mlp"):
                    if (name := f"layers.{layer.index}.{part}") in routers:
                        self._watch(getattr(layer, part).router, self.names.index(name))

    def reset(self) -> None:
        """Forget the last step."""
        self.totals.zero_()

    def losses(self, totals: torch.Tensor, micro_batches: int) -> tuple[float, float]:
        """(load_balancing_loss, z_loss): means over routers and micro-batches of totals summed over all ranks; 0
        for a model without routers."""
        if not self.names:
            return 0.0, 0.0
        share = micro_batches * len(self.names)
        starts = self._starts[:-1]
        balance = sum(float(totals[start]) for start in starts) / share
        z = sum(float(totals[start + 1]) for start in starts) / share
        return balance, z

    def counts(self, totals: torch.Tensor) -> dict[str, list[int]]:
        """By router: the (token, slot) pairs that each expert received."""
        return {
            name: [round(count) for count in totals[start + 2 : start + 2 + size].tolist()]
            for name, start, size in zip(self.names, self._starts, self.experts)
        }

    def loads(self, totals: torch.Tensor) -> dict[str, dict[str, float]]:
        """By router: largest and smallest expert load over the mean, entropy of the load in nats, experts without a token."""
        figures = {}
        for name, counts in self.counts(totals).items():
            mean = sum(counts) / len(counts)
            shares = [count / sum(counts) for count in counts]
            figures[name] = {
                "max_over_mean": max(counts) / mean,
                "min_over_mean": min(counts) / mean,
                "entropy": -sum(share * math.log(share) for share in shares if share > 0),
                "dead": sum(count == 0 for count in counts),
            }
        return figures

    def _watch(self, router: Router, number: int) -> None:
        place = self.totals[self._starts[number] : self._starts[number + 1]]

        def observe(balance: torch.Tensor, z: torch.Tensor, counts: torch.Tensor) -> None:
            place[0] += balance
            place[1] += z
            place[2:] += counts

        router.observe = observe
