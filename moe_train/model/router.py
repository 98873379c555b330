"""The router: which experts a token goes to, with what weight, and the losses that keep the experts in balance.

JetMoE (eq. 1, 2, 10, 11): logits in the model's precision, cast to fp32; the k largest are kept and the softmax is
taken over them alone, or (``renormalize: false``, OLMoE) over all experts. A load-balancing loss
(:mod:`moe_train.model.balance`) and the z-loss ``mean logsumexp^2`` of the logits (Zoph et al.) are means over the
tokens of one micro-batch (or of one sequence, ``scope: sequence``), summed over the tensor ranks that share it, so
that no layout changes them.

Skywork-MoE (eq. 6): before the choice the logits of a token may be brought to one mean and one spread, so that its
gates do not drift towards being all alike. An expert may have a capacity (:mod:`moe_train.model.capacity`); what it
drops has the gate 0 and is not sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moe_train.model.balance import LOSSES
from moe_train.model.capacity import capacity, within_capacity
from moe_train.model.router_config import RouterConfig
from moe_train.model.parameters import new_parameter, output_bias, sequence_parallel
from parallel.topology import Topology

NORMALIZE_EPS = 1e-6
"""Added to the variance of a token's logits: equal logits stay equal, with a gradient that is finite. The paper gives
none."""
_MAX_RATIO = 1e6  # of two gates, for a mean that one token cannot make infinite


@dataclass(frozen=True)
class Tokens:
    """How the local rows ``[s * B, H]`` of a layer lie in the micro-batch.

    ``sequences`` is B; ``length`` the length S of the sequences before padding, over all tensor ranks; ``first`` the
    position of this rank's first row in them; positions from ``length`` on are padding. ``mask``: what each query may
    look at (:func:`moe_train.model.documents.document_mask`); None: everything before it.
    """

    sequences: int
    length: int
    first: int
    mask: torch.Tensor | None = None

    def valid_rows(self, rows: int) -> int:
        """How many of the local rows are no padding (they come first)."""
        return max(0, min(rows // self.sequences, self.length - self.first)) * self.sequences


class Observation(NamedTuple):
    """What a router did in one micro-batch: this rank's part, detached.

    ``counts``: ``[E]`` tokens that chose each expert. ``overflow``: the pairs beyond the experts' capacity, over all
    tensor ranks, or None without one. ``sharpness``: the sums over the tokens of Max1/Max2 and Max2/Max3 of the gates,
    or None where nobody asks.
    """

    balance: torch.Tensor
    z: torch.Tensor
    counts: torch.Tensor
    overflow: torch.Tensor | None = None
    sharpness: torch.Tensor | None = None


class Router(torch.nn.Module):
    """``[T, H]`` tokens to gates ``[T, k]`` and experts ``[T, k]``, largest first, and which of these pairs are sent.

    The last is None where all are, as always outside of training: what is evaluated or generated is never dropped.

    Attributes:
        observe: called with an :class:`Observation` once a micro-batch.
        watch_gates: whether it is to tell how sharp the gates are.
        load_balancing_coef: the weight of the load-balancing loss, of the config unless it is adapted.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        config: RouterConfig,
        topology: Topology,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.num_experts, self.top_k, self.config, self.topology = num_experts, top_k, config, topology
        self.weight = sequence_parallel(
            new_parameter(
                f"{name}.weight",
                (num_experts, hidden_size),
                replica=topology.tensor_rank,
                dtype=dtype,
                device=topology.device,
            )
        )
        self.bias = output_bias(f"{name}.bias", num_experts, topology, dtype) if config.bias else None
        self.load_balancing_coef = config.load_balancing_coef
        self.observe, self.watch_gates = None, False

    def forward(self, x_th: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        logits_te = F.linear(x_th, self.weight, self.bias).float()
        scores_te = normalize(logits_te, self.config.logit_scale) if self.config.normalize_logits else logits_te
        kept_tk, experts_tk = scores_te.topk(self.top_k, dim=-1)
        if self.config.renormalize:
            gates_tk = kept_tk.softmax(dim=-1)
        else:
            gates_tk = scores_te.softmax(dim=-1).gather(1, experts_tk)
        gates_tk = gates_tk.to(x_th.dtype)
        valid = tokens.valid_rows(len(x_th))
        sent_tk = None
        if self.training and self.config.drop_by is not None:
            probability_te = scores_te.detach().softmax(dim=-1)
            sent_tk = within_capacity(
                experts_tk, probability_te, self._capacity(tokens), self.config.drop_by, valid, self.topology
            )
            gates_tk = gates_tk.masked_fill(~sent_tk, 0.0)
        if self.training and torch.is_grad_enabled():
            scores_ve = scores_te[:valid]
            logits_ve = logits_te[:valid] if self.config.normalize_logits else scores_ve
            observed = self._losses(logits_ve, scores_ve, experts_tk[:valid], tokens)
            loss = self.load_balancing_coef * observed.balance + self.config.z_coef * observed.z
            gates_tk = MoEAuxLossAutoScaler.apply(gates_tk, loss)
            if self.observe is not None:
                self.observe(observed._replace(balance=observed.balance.detach(), z=observed.z.detach()))
        return gates_tk, experts_tk, sent_tk

    def _losses(
        self, logits_te: torch.Tensor, scores_te: torch.Tensor, experts_tk: torch.Tensor, tokens: Tokens
    ) -> Observation:
        """This rank's part of both losses: over the tensor ranks the parts add up to the loss of the micro-batch."""
        groups = tokens.sequences if self.config.scope == "sequence" else 1
        per_group = tokens.sequences * tokens.length // groups
        chosen = torch.zeros_like(logits_te).scatter_(1, experts_tk, 1.0)
        by_group = (len(chosen) // groups, groups, self.num_experts)
        counts_ge = chosen.view(by_group).sum(0)
        local_counts = counts_ge.sum(0)
        counts_ge = self.topology.sum_over_tensor_ranks(counts_ge)
        log_total_t = logits_te.logsumexp(dim=-1, keepdim=True)
        z = log_total_t.square().sum() / (per_group * groups)
        if self.config.load_balancing == "none":
            balance = torch.zeros_like(z)
        else:
            log_total_t = scores_te.logsumexp(dim=-1, keepdim=True) if self.config.normalize_logits else log_total_t
            probability_te = (scores_te - log_total_t).exp()
            loss = LOSSES[self.config.load_balancing]
            balance = loss(probability_te.view(by_group).sum(0), counts_ge, per_group, self.top_k, self.topology)
        overflow = None
        if self.config.capacity_factor is not None:
            overflow = (counts_ge.sum(0) - self._capacity(tokens)).clamp(min=0).sum()
        sharpness = _sharpness(scores_te.detach()) if self.watch_gates else None
        return Observation(balance, z, local_counts, overflow, sharpness)

    def _capacity(self, tokens: Tokens) -> int:
        return capacity(self.config.capacity_factor, tokens.sequences * tokens.length, self.top_k, self.num_experts)


def normalize(logits_te: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * (logits - mean) / standard deviation`` over the experts of each token (Skywork-MoE eq. 6)."""
    return scale * F.layer_norm(logits_te, logits_te.shape[-1:], eps=NORMALIZE_EPS)


def _sharpness(scores_te: torch.Tensor) -> torch.Tensor:
    """``[2]``: Max1/Max2 and Max2/Max3 of each token's probabilities, summed; 0 where there is no third."""
    largest_t3 = scores_te.topk(min(3, scores_te.shape[-1]), dim=-1).values
    ratios_t2 = (largest_t3[:, :-1] - largest_t3[:, 1:]).clamp(max=math.log(_MAX_RATIO)).exp()
    return F.pad(ratios_t2.sum(dim=0), (0, 2 - ratios_t2.shape[-1]))
