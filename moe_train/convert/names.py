"""Which tensor of Hugging Face's JetMoE is which parameter of ours. Needs no torch.

Every tensor has one counterpart with the same elements in the same order; only keys and values, ``[2D, H]``
there (rows of K, then of V), have a dimension of their own here, ``[2, D, H]``.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.model.config import ModelConfig

WHOLE_MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Our name -> theirs."""

ONE_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.router.weight": "self_attention.experts.router.layer.weight",
    "attention.kv.weight": "self_attention.kv_proj.weight",
    "attention.query.weight": "self_attention.experts.input_linear.weight",
    "attention.output.weight": "self_attention.experts.output_linear.weight",
    "attention.bias": "self_attention.experts.bias",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.router.layer.weight",
    "mlp.gate_up.weight": "mlp.input_linear.weight",
    "mlp.down.weight": "mlp.output_linear.weight",
    "mlp.bias": "mlp.bias",
}
"""The same below ``layers.{i}.`` and ``model.layers.{i}.``."""


@dataclass(frozen=True)
class Counterpart:
    """One parameter under both names; the shapes have the same elements in the same order."""

    name: str
    shape: tuple[int, ...]
    hf_name: str
    hf_shape: tuple[int, ...]


def counterparts(config: ModelConfig) -> list[Counterpart]:
    """Every parameter of a model, in the order of the forward pass; a tied head is the embedding."""
    pairs = []
    for name, shape in config.parameter_shapes().items():
        if name in WHOLE_MODEL:
            hf_name = WHOLE_MODEL[name]
        else:
            _, layer, part = name.split(".", 2)
            hf_name = f"model.layers.{layer}.{ONE_LAYER[part]}"
        is_kv = name.endswith("attention.kv.weight")
        hf_shape = (shape[0] * shape[1], *shape[2:]) if is_kv else shape
        pairs.append(Counterpart(name, shape, hf_name, hf_shape))
    return pairs
