"""Mixture of attention heads (JetMoE eq. 5-9): shared keys and values, an expert owns its query and output projections.

For each token the router picks k experts. Each computes a query for all n heads; every query attends to the shared keys and
values of the sequence; each result goes back to its expert's output projection; the gates weight the outputs.

Under tensor parallelism a rank holds a part of the sequence outside of the attention itself and a part of the heads
inside of it. Whole experts project the queries of this rank's tokens; an all-to-all over the tensor ranks turns
[part of the sequence, all heads] into [whole sequence, part of the heads], and back after the attention. Keys and values come
from a column-parallel layer, which gathers the sequence anyway.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, all_to_all_sp2hp

from moe_train.model.config import ModelConfig
from moe_train.model.grouped_linear import GroupedLinear
from moe_train.model.parameters import new_parameter, sequence_parallel
from moe_train.model.rope import rotate
from moe_train.model.router import Router, Tokens
from parallel.dispatch import ExpertDispatcher
from parallel.placement import Placement, place
from parallel.topology import Topology


@dataclass
class LayerCache:
    """Keys (rotated) and values of the tokens that one layer has seen, ``[S, B, n / TP, d]`` each; None before the first."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return the whole."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.values = values if self.values is None else torch.cat([self.values, values])
        return self.keys, self.values


class MixtureOfAttention(torch.nn.Module):
    """``[s, B, H] -> [s, B, H]``, s the part of the sequence on this tensor rank."""

    def __init__(self, name: str, config: ModelConfig, engine, topology: Topology, dtype: torch.dtype, sharded: bool):
        super().__init__()
        attention = config.attention
        self.top_k, self.head_dim = attention.top_k, attention.head_dim
        self.tensor_ranks = topology.layout.tensor
        self.local_heads = attention.num_kv_heads // self.tensor_ranks
        width, hidden = attention.width, config.hidden_size
        self.router = Router(
            f"{name}.router", hidden, attention.num_experts, attention.top_k, config.router, topology, dtype
        )
        self.dispatcher = ExpertDispatcher(attention.num_experts, engine, topology, sharded)
        self.query = GroupedLinear(f"{name}.query", attention.num_experts, hidden, width, topology, dtype, sharded)
        self.output = GroupedLinear(f"{name}.output", attention.num_experts, width, hidden, topology, dtype, sharded)
        self.kv = ColumnParallelLinear(
            hidden, 2 * width, config=engine, init_method=None, bias=False, gather_output=False, tp_group=topology.groups.tp
        )
        local = (2, width // self.tensor_ranks, hidden)
        offset = (0, topology.tensor_rank * local[1], 0)
        place(self.kv.weight, Placement(f"{name}.kv.weight", (2, width, hidden), offset, local, local))
        self.kv.weight.tensor_model_parallel = True  # megatron-core says so only where it initialises
        self.bias = sequence_parallel(
            new_parameter(f"{name}.bias", (hidden,), replica=topology.tensor_rank, dtype=dtype, device=topology.device)
        )

    def forward(self, x_sbh: torch.Tensor, tokens: Tokens, rotary, cache: LayerCache | None = None) -> torch.Tensor:
        x_th = x_sbh.flatten(0, 1)
        gates_tk, experts_tk = self.router(x_th, tokens)
        plan = self.dispatcher.plan(experts_tk)
        q_tkd = plan.collect_pairs(self.query(plan.dispatch_tokens(x_th), plan.counts))
        k_sbnd, v_sbnd = self._keys_and_values(x_sbh)
        q_sbknd = self._to_heads(q_tkd, k_sbnd.shape[:2])
        o_sbknd = self._attend(rotate(q_sbknd, rotary), rotate(k_sbnd, rotary), v_sbnd, tokens, cache)
        o_tkd = self._to_sequence(o_sbknd, q_tkd.shape)
        out_th = plan.collect_weighted(self.output(plan.dispatch_pairs(o_tkd), plan.counts), gates_tk)
        return (out_th + self.bias).view_as(x_sbh)

    def _keys_and_values(self, x_sbh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of this rank's heads over the whole sequence, ``[S, B, n / TP, d]`` each."""
        kv, _ = self.kv(x_sbh)
        return kv.view(*kv.shape[:2], 2, self.local_heads, self.head_dim).unbind(2)

    def _to_heads(self, q_tkd: torch.Tensor, whole: torch.Size) -> torch.Tensor:
        """``[s * B, k, n * d]`` of this part of the sequence to ``[S, B, k, n / TP, d]`` of this rank's heads."""
        if self.tensor_ranks > 1:
            q_tkd = all_to_all_sp2hp(q_tkd.flatten(0, 1))
        return q_tkd.view(*whole, self.top_k, self.local_heads, self.head_dim)

    def _to_sequence(self, o_sbknd: torch.Tensor, home: torch.Size) -> torch.Tensor:
        """The way back of :meth:`_to_heads`: ``[s * B, k, n * d]``."""
        if self.tensor_ranks > 1:
            o_sbknd = all_to_all_hp2sp(o_sbknd.reshape(-1, self.local_heads * self.head_dim))
        return o_sbknd.reshape(home)

    def _attend(self, q_sbknd, k_sbnd, v_sbnd, tokens: Tokens, cache: LayerCache | None) -> torch.Tensor:
        """Causal attention of every slot's query to the shared keys, ``[S, B, k, n / TP, d]``.

        Head j of any slot uses kv head j: the k slots of one head are one group of grouped-query attention.
        """
        causal = True
        if cache is not None:
            if cache.keys is not None:  # one new token: it may look at everything
                causal = False
                k_sbnd, v_sbnd = cache.extend(k_sbnd[: tokens.length], v_sbnd[: tokens.length])
            else:
                cache.extend(k_sbnd[: tokens.length], v_sbnd[: tokens.length])
        q_bnksd = q_sbknd.permute(1, 3, 2, 0, 4)
        k_bnsd, v_bnsd = k_sbnd.permute(1, 2, 0, 3), v_sbnd.permute(1, 2, 0, 3)
        if tokens.mask is None:
            q_bhsd = q_bnksd.flatten(1, 2)
            o_bhsd = F.scaled_dot_product_attention(q_bhsd, k_bnsd, v_bnsd, is_causal=causal, enable_gqa=self.top_k > 1)
            o_bnksd = o_bhsd.view(q_bnksd.shape)
        else:
            # The slots as more positions of one head: no fused kernel of a GPU takes a mask and grouped queries at once.
            o_bnqd = F.scaled_dot_product_attention(q_bnksd.flatten(2, 3), k_bnsd, v_bnsd, attn_mask=tokens.mask)
            o_bnksd = o_bnqd.view(q_bnksd.shape)
        return o_bnksd.permute(3, 0, 2, 1, 4)
