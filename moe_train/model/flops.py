"""Counting: parameter shapes, total and active parameters, and the operations of one token of training. Needs
no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_train.model.config import ModelConfig, Weight

Shape = tuple[int, ...]


def layer_weights(config: ModelConfig, layer: int) -> dict[str, Weight]:
    """Global name -> parameter of one layer (0-based), in the order of the forward pass."""
    norm = Weight((config.hidden_size,))
    gated = config.depth is not None and config.depth.gates(layer)
    weights = {"depth_gate.weight": Weight((1, config.hidden_size))} if gated else {}
    weights["attention_norm.weight"] = norm
    weights |= {f"attention.{name}": weight for name, weight in config.attention.weights(config).items()}
    weights["mlp_norm.weight"] = norm
    weights |= {f"mlp.{name}": weight for name, weight in config.mlp.weights(config).items()}
    return {f"layers.{layer}.{name}": weight for name, weight in weights.items()}


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global name -> global shape of every parameter; the names that initialisation, checkpoints and
    conversion use.

    A tied head is not listed: it is the embedding.
    """
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= {name: weight.shape for name, weight in layer_weights(config, layer).items()}
    shapes["final_norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Number of elements of all parameters."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def num_active_parameters(config: ModelConfig) -> int:
    """Elements that take part in one token: each layer's top_k experts, and everything that is not an
    expert."""
    idle = 0
    for part in (config.attention, config.mlp):
        for shape, split in part.weights(config).values():
            if split == "expert":
                idle += math.prod(shape) // part.num_experts * (part.num_experts - part.top_k)
    return num_parameters(config) - config.num_layers * idle


def flops_per_token(config: ModelConfig, sequence_length: int, through: float | Sequence[float] = 1.0) -> float:
    """Operations per token of a training step: 3 x the forward pass (the backward pass is two products for
    each one).

    Matrix products only, a multiply-add is 2; top_k experts, the routers and the head, the embedding look-up
    not; attention is causal, so each position meets half of the sequence on average. Recomputation is not
    counted: these are the operations that training needs, not those a machine happens to do (so a model FLOP
    utilisation does not grow by recomputing).

    Gated layers take the part `through` of the tokens, each its own where there are several, which meet as much fewer
    keys.

    >>> round(flops_per_token(ModelConfig(), 4096) / 1e9, 1)                     # JetMoE-8B
    16.4
    """
    hidden, gated = config.hidden_size, len(config.gated_layers)
    parts = through if isinstance(through, Sequence) else [through] * gated

    def layer(length: float) -> float:
        return config.attention.multiply_adds(hidden, length) + config.mlp.multiply_adds(hidden)

    layers = (config.num_layers - gated) * layer(sequence_length)
    layers += sum(part * layer(part * sequence_length) + hidden for part in parts)
    return 3.0 * 2 * (layers + config.vocab_size * hidden)
