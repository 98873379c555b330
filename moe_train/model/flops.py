"""Counting: parameter shapes, total and active parameters, and the operations of one token of training. Needs
no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_train.model.config import ModelConfig

Shape = tuple[int, ...]


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Global name -> shape of the parameters of one layer (0-based). E experts, H hidden, D = kv heads *
    head_dim, F ffn."""
    attention, mlp, hidden = config.attention, config.mlp, config.hidden_size
    width, ffn = attention.width, mlp.ffn_hidden_size
    shapes: dict[str, Shape] = {
        "attention_norm.weight": (hidden,),
        "attention.router.weight": (attention.num_experts, hidden),
        "attention.kv.weight": (2, width, hidden),
        "attention.query.weight": (attention.num_experts, width, hidden),
        "attention.output.weight": (attention.num_experts, hidden, width),
        "attention.bias": (hidden,),
        "mlp_norm.weight": (hidden,),
        "mlp.router.weight": (mlp.num_experts, hidden),
        "mlp.gate_up.weight": (mlp.num_experts, 2 * ffn, hidden),
        "mlp.down.weight": (mlp.num_experts, hidden, ffn),
        "mlp.bias": (hidden,),
    }
    return {f"layers.{layer}.{name}": shape for name, shape in shapes.items()}


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global name -> global shape of every parameter; the names that initialisation, checkpoints and
    conversion use.

    A tied head is not listed: it is the embedding.
    """
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= layer_shapes(config, layer)
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
    share = {
        "attention.query.weight": config.attention,
        "attention.output.weight": config.attention,
        "mlp.gate_up.weight": config.mlp,
        "mlp.down.weight": config.mlp,
    }
    active = 0
    for name, shape in parameter_shapes(config).items():
        experts = share.get(name.split(".", 2)[-1]) if name.startswith("layers.") else None
        active += math.prod(shape) if experts is None else math.prod(shape[1:]) * experts.top_k
    return active


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations per token of a training step: 3 x the forward pass (the backward pass is two products for
    each one).

    Matrix products only, a multiply-add is 2; top_k experts, both routers and the head, the embedding look-up
    not; attention is causal, so each position meets half of the sequence on average. Recomputation is not
    counted: these are the operations that training needs, not those a machine happens to do (so a model FLOP
    utilisation does not grow by recomputing).

    >>> round(flops_per_token(ModelConfig(), 4096) / 1e9, 1)                     # JetMoE-8B
    16.4
    """
    attention, mlp, hidden = config.attention, config.mlp, config.hidden_size
    width = attention.width
    projections = 2 * hidden * width + attention.top_k * 2 * hidden * width
    experts = mlp.top_k * 3 * hidden * mlp.ffn_hidden_size
    routers = (attention.num_experts + mlp.num_experts) * hidden
    scores = attention.top_k * width * sequence_length  # q.k and p.v, each half of [S, S]
    forward = 2 * (
        config.num_layers * (projections + experts + routers + scores) + config.vocab_size * hidden
    )
    return 3.0 * forward
