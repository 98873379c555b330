"""The shape of a JetMoE-class model (arXiv 2404.07413, Table 1). Needs no torch.

The parts nest (`attention`, `mlp`, `router`), so that another kind of attention or MLP is another class in
its place.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class ModelPart(BaseModel):
    """Strict, frozen, and without unknown keys: what a model file says is what is built."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _check_top_k(top_k: int, info: ValidationInfo) -> int:
    experts = info.data.get("num_experts", top_k)  # absent when it was itself refused
    if top_k > experts:
        raise ValueError(
            f"top_k {top_k} is more than num_experts {experts}; the nearest that would do: {experts}"
        )
    return top_k


TopK = Annotated[int, Field(ge=1, validate_default=True), AfterValidator(_check_top_k)]
"""Experts that each token uses, from 1 to `num_experts`, which stands before it."""


class AttentionConfig(ModelPart):
    """Mixture of attention heads: keys and values are shared, each expert has its own query and output
    projections."""

    num_kv_heads: int = Field(16, ge=1)
    """Heads of one expert, and of the shared keys and values (n)."""
    head_dim: int = Field(128, ge=2)
    """Channels of one head (d); even, because rotary embeddings turn pairs of them."""
    num_experts: int = Field(8, ge=1)
    top_k: TopK = 2
    """Experts that each token uses; the model has top_k * num_kv_heads query heads."""

    @property
    def width(self) -> int:
        """D = n * d, the width of one expert's query; it need not equal the hidden size."""
        return self.num_kv_heads * self.head_dim

    @field_validator("head_dim")
    @classmethod
    def _check_head_dim(cls, head_dim: int) -> int:
        if head_dim % 2:
            raise ValueError(
                f"head_dim {head_dim} is odd, and rotary embeddings turn pairs;"
                f" the nearest that would do: {head_dim + 1}"
            )
        return head_dim


class MLPConfig(ModelPart):
    """Mixture of gated MLP experts: ``output(activation(gate x) * up x)``."""

    ffn_hidden_size: int = Field(5632, ge=1)
    """Width of one expert (F); gate and up are [F, H] each."""
    num_experts: int = Field(8, ge=1)
    top_k: TopK = 2
    activation: Literal["silu", "gelu", "relu"] = "silu"


class RouterConfig(ModelPart):
    """The routers' losses (paper eq. 10-12), summed over both routers of every layer."""

    load_balancing_coef: float = Field(0.01, ge=0)
    """alpha of ``N * sum_i f_i P_i``, which is 1 when the load is even."""
    z_coef: float = Field(0.001, ge=0)
    """beta of ``mean(logsumexp(logits)^2)``."""
    scope: Literal["micro_batch", "sequence"] = "micro_batch"
    """The tokens over which f and P are averaged: one micro-batch, or each sequence by itself (then the size
    of the
    micro-batch does not matter)."""


class ModelConfig(ModelPart):
    """A model; the defaults are JetMoE-8B's. `moe_train.model.flops` counts its parameters and operations."""

    vocab_size: int = Field(32000, ge=2)
    hidden_size: int = Field(2048, ge=1)
    num_layers: int = Field(24, ge=1)
    attention: AttentionConfig = AttentionConfig()
    mlp: MLPConfig = MLPConfig()
    router: RouterConfig = RouterConfig()
    norm_eps: float = Field(1.0e-6, gt=0)
    """Of the final norm alone; the norms inside the layers keep 1e-6, as in the original code."""
    rope_theta: float = Field(10000.0, gt=0)
    max_sequence_length: int = Field(4096, ge=1)
    """The longest sequence that the model is trained on or generates."""
    init_std: float = Field(0.01, ge=0)
    tie_embeddings: bool = True

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global name -> global shape of every parameter, in the order of the forward pass."""
        from moe_train.model.flops import parameter_shapes

        return parameter_shapes(self)

    def num_parameters(self) -> int:
        """All parameters, the embedding counted once when it is tied (8,522,237,952 for JetMoE-8B)."""
        from moe_train.model.flops import num_parameters

        return num_parameters(self)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: top_k experts of each layer (2,331,445,248 for JetMoE-8B)."""
        from moe_train.model.flops import num_active_parameters

        return num_active_parameters(self)

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of training (forward and backward) per token at `sequence_length`."""
        from moe_train.model.flops import flops_per_token

        return flops_per_token(self, sequence_length)
