"""The router: which experts a token goes to, with what weight, and the losses that keep the experts in balance.

JetMoE (eq. 1, 2, 10, 11): logits in the model's precision, cast to fp32; the k largest are kept and the softmax is taken over
them alone (``renormalize: false``, as OLMoE: over all experts). Load-balancing loss ``E * sum_e f_e P_e`` (Fedus et al.), 1 when balanced; z-loss ``mean logsumexp^2``
(Zoph et al.). Both are means over the tokens of one micro-batch (or of one sequence, ``scope: sequence``), summed over
the tensor ranks that share it, so that no layout changes them.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moe_train.model.config import RouterConfig
from moe_train.model.parameters import new_parameter, output_bias, sequence_parallel
from parallel.topology import Topology


@dataclass(frozen=True)
class Tokens:
    """How the local rows ``[s * B, H]`` of a layer lie in the micro-batch.

    ``sequences`` is B; ``length`` the length S of the sequences before padding, over all tensor ranks; ``first`` the
    position of this rank's first row in them; positions from ``length`` on are padding. ``mask``: what each query may look
    at (:func:`moe_train.model.documents.document_mask`); None: everything before it.
    """

    sequences: int
    length: int
    first: int
    mask: torch.Tensor | None = None

    def valid_rows(self, rows: int) -> int:
        """How many of the local rows are no padding (they come first)."""
        return max(0, min(rows // self.sequences, self.length - self.first)) * self.sequences


class Router(torch.nn.Module):
    """``[T, H]`` tokens to gates ``[T, k]`` and experts ``[T, k]``, largest first.

    Attributes:
        observe: called with (load_balancing_loss, z_loss, counts [E]) of this rank's part, detached, once a micro-batch.
    """

    def __init__(
        self, name: str, hidden_size: int, num_experts: int, top_k: int, config: RouterConfig, topology: Topology, dtype: torch.dtype
    ):
        super().__init__()
        self.num_experts, self.top_k, self.config, self.topology = num_experts, top_k, config, topology
        self.weight = sequence_parallel(
            new_parameter(
                f"{name}.weight", (num_experts, hidden_size), replica=topology.tensor_rank, dtype=dtype, device=topology.device
            )
        )
        self.bias = output_bias(f"{name}.bias", num_experts, topology, dtype) if config.bias else None
        self.observe = None

    def forward(self, x_th: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        logits_te = F.linear(x_th, self.weight, self.bias).float()
        kept_tk, experts_tk = logits_te.topk(self.top_k, dim=-1)
        gates_tk = kept_tk.softmax(dim=-1) if self.config.renormalize else logits_te.softmax(dim=-1).gather(1, experts_tk)
        gates_tk = gates_tk.to(x_th.dtype)
        if self.training and torch.is_grad_enabled():
            valid = tokens.valid_rows(len(x_th))
            balance, z, counts = self._losses(logits_te[:valid], experts_tk[:valid], tokens)
            loss = self.config.load_balancing_coef * balance + self.config.z_coef * z
            gates_tk = MoEAuxLossAutoScaler.apply(gates_tk, loss)
            if self.observe is not None:
                self.observe(balance.detach(), z.detach(), counts)
        return gates_tk, experts_tk

    def _losses(self, logits_te: torch.Tensor, experts_tk: torch.Tensor, tokens: Tokens):
        """This rank's part of both losses: over the tensor ranks the parts add up to the loss of the micro-batch."""
        groups = tokens.sequences if self.config.scope == "sequence" else 1
        per_group = tokens.sequences * tokens.length // groups
        chosen = torch.zeros_like(logits_te).scatter_(1, experts_tk, 1.0)
        by_group = (len(chosen) // groups, groups, self.num_experts)
        counts_ge = chosen.view(by_group).sum(0)
        local_counts = counts_ge.sum(0)
        counts_ge = self.topology.sum_over_tensor_ranks(counts_ge)
        log_total_t = logits_te.logsumexp(dim=-1, keepdim=True)
        probability_ge = (logits_te - log_total_t).exp().view(by_group).sum(0)
        scale = self.num_experts / (per_group * per_group * self.top_k * groups)
        balance = (probability_ge * counts_ge).sum() * scale
        z = log_total_t.square().sum() / (per_group * groups)
        return balance, z, local_counts
