"""The section `router` of a model file: gates, losses and capacity of its routers. Needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from moe_train.model.part import ModelPart, Weight


class AdaptiveConfig(ModelPart):
    """A load-balancing coefficient of each router's own that follows its drop rate d (Skywork-MoE eq. 7-9): after each
    step ``coef = beta * coef + (1 - beta) * min(xi * d, max_coef)``."""

    xi: float = Field(0.2, gt=0)
    max_coef: float = Field(0.01, gt=0)
    """Reached at a drop rate of max_coef / xi, which is 5% by default."""
    beta: float = Field(0.99, ge=0, lt=1)


class RouterConfig(ModelPart):
    """A router: its gates, its losses (summed over the routers), and how much an expert takes."""

    load_balancing: Literal["switch", "skywork", "none"] = "switch"
    """``N * sum_i f_i P_i``, 1 when the load is even (JetMoE eq. 10); ``sum_i (1/N - P_i)^2``, 0 when the mean
    probabilities are even (Skywork-MoE eq. 3); or none."""
    load_balancing_coef: float = Field(0.01, ge=0)
    """alpha, the weight of that loss; where it starts, with `adaptive`."""
    z_coef: float = Field(0.001, ge=0)
    """beta of ``mean(logsumexp(logits)^2)`` (JetMoE eq. 11), of the logits as they were before any normalisation."""
    scope: Literal["micro_batch", "sequence"] = "micro_batch"
    """The tokens over which f and P are averaged: one micro-batch, or each sequence by itself (then the size of the
    micro-batch does not matter)."""
    renormalize: bool = True
    """Whether the gates of a token's top_k experts add up to 1 (JetMoE, Mixtral, Skywork-MoE), or are their
    part of a softmax over all experts (OLMoE)."""
    bias: bool = False
    """Whether the logits have a bias (Skywork-MoE eq. 1)."""
    normalize_logits: bool = False
    """Bring each token's logits to mean 0 and standard deviation `logit_scale` before the choice (Skywork-MoE
    eq. 6)."""
    logit_scale: float = Field(1.0, gt=0)
    """lambda: the larger, the sharper the gates."""
    capacity_factor: float | None = None
    """The most tokens of a micro-batch that an expert takes, over its even share (tokens * top_k / num_experts);
    null: unlimited. Without `drop_by` it takes them all, and what would have been dropped is reported."""
    drop_by: Literal["position", "probability"] | None = None
    """What an expert leaves out in training beyond its capacity: the last tokens of the micro-batch, or the least
    probable; null: nothing."""
    adaptive: AdaptiveConfig | None = None
    """Let `load_balancing_coef` follow the drop rate; null: it stays."""

    def weights(self, num_experts: int, hidden: int) -> dict[str, Weight]:
        """Name -> parameter of one router."""
        weights = {"router.weight": Weight((num_experts, hidden))}
        return weights | ({"router.bias": Weight((num_experts,))} if self.bias else {})

    @field_validator("logit_scale")
    @classmethod
    def _check_logit_scale(cls, scale: float, info: ValidationInfo) -> float:
        if scale != 1 and not info.data.get("normalize_logits"):
            raise ValueError(f"{scale:g} is of use only with normalize_logits: true")
        return scale

    @field_validator("capacity_factor")
    @classmethod
    def _check_capacity_factor(cls, factor: float | None) -> float | None:
        if factor is not None and factor < 1:
            raise ValueError(
                f"{factor:g} has no room for the top_k experts of every token even where the load is even;"
                " set it to 1 or more, or to null"
            )
        return factor

    @field_validator("drop_by")
    @classmethod
    def _check_drop_by(cls, drop_by: str | None, info: ValidationInfo) -> str | None:
        if drop_by is not None and info.data.get("capacity_factor", 1.0) is None:
            raise ValueError(f"{drop_by} needs a capacity_factor, such as 1.25")
        return drop_by

    @field_validator("adaptive")
    @classmethod
    def _check_adaptive(cls, adaptive: AdaptiveConfig | None, info: ValidationInfo) -> AdaptiveConfig | None:
        if adaptive is not None and info.data.get("capacity_factor", 1.0) is None:
            raise ValueError("follows the drop rate, which needs a capacity_factor, such as 1.25")
        if adaptive is not None and info.data.get("load_balancing") == "none":
            raise ValueError("sets the coefficient of a loss, and load_balancing is none")
        return adaptive
