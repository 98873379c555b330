"""How alike the experts of a layer are: their mean pairwise cosine. Copies of one MLP are at 1, random ones at 0.

What Skywork-MoE watches in upcycled models: the experts of the worst ones stayed alike.
"""

from __future__ import annotations

import torch

from moe_train.model.transformer import Transformer
from parallel.topology import Topology


@torch.no_grad()
def expert_similarities(chunks: list[Transformer], topology: Topology) -> dict[str, float]:
    """By layer and part (``layers.3.mlp``), of the whole model, on every rank; every rank must call it."""
    own = {}
    for chunk in chunks:
        for layer in chunk.layers:
            for part in ("attention", "mlp"):
                experts = [child for child in getattr(layer, part).children() if hasattr(child, "matrices")]
                if experts and experts[0].num_experts > 1:
                    own[f"layers.{layer.index}.{part}"] = _mean_cosine(experts, topology)
    everywhere: dict[str, float] = {}
    for each in topology.gather(own):
        everywhere.update(each)
    return everywhere


def _mean_cosine(layers: list[torch.nn.Module], topology: Topology) -> float:
    """Over the pairs of E experts, each the vector of its matrices in ``layers``.

    For unit vectors u the mean is ``(|sum_e u_e|^2 - E) / (E (E - 1))``: a sum over the experts, wherever they are, in
    the place of a product for each pair.
    """
    weights, total = [layer.matrices for layer in layers], layers[0].num_experts
    local = len(weights[0])
    norms = [
        torch.stack([weight[expert].float().norm() for weight in weights]).norm().clamp(min=1e-30)
        for expert in range(local)
    ]
    square = 0.0
    for weight in weights:
        mean = sum(weight[expert].float() / norms[expert] for expert in range(local))
        if local < total:
            mean = topology.sum_over_expert_ranks(mean)
        square += float(mean.double().square().sum())
    return (square - total) / (total * (total - 1))
