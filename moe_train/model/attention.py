"""The kinds of attention. Each maps ``[s, B, H] -> [s, B, H]``, s the part of the sequence on this tensor rank, in a
computation that takes turns (:mod:`parallel.turns`): the mixture yields while rows travel.

Mixture of attention heads (JetMoE eq. 5-9): for each token the router picks k experts. Each computes a query for all n
heads; every query attends to the shared keys and values of the sequence; each result goes back to its expert's output
projection; the gates weight the outputs. Under tensor parallelism whole experts project the queries of this rank's
tokens; an all-to-all over the tensor ranks turns [part of the sequence, all heads] into [whole sequence, part of the
heads], and back after the attention. Keys and values come from a column-parallel layer, which gathers the sequence
anyway.

Grouped-query attention (Ainslie et al., arXiv 2305.13245): one column-parallel layer for queries, keys and values, a
row-parallel one for the output; a tensor rank has whole groups.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, all_to_all_sp2hp

from moe_train.model.attention_core import LayerCache, attend
from moe_train.model.config import ModelConfig
from moe_train.model.kernels import kernels_of
from moe_train.model.options import ModelOptions
from moe_train.model.parameters import output_bias
from moe_train.model.router import Router
from moe_train.model.tokens import Tokens
from parallel.dispatch.kinds import DISPATCHERS
from parallel.topology import Topology
from parallel.transformer_engine import row_multiple
from parallel.turns import Steps, without_waiting


class MixtureOfAttention(torch.nn.Module):
    """Experts with queries and outputs of their own over shared keys and values."""

    def __init__(self, name: str, config: ModelConfig, engine, topology: Topology, options: ModelOptions):
        super().__init__()
        attention, hidden = config.attention, config.hidden_size
        experts, width = attention.num_experts, attention.width
        sharded, dtype = options.sharded_attention, options.dtype
        kernels = kernels_of(options)
        self.top_k, self.head_dim = attention.top_k, attention.head_dim
        self.tensor_ranks = topology.layout.tensor
        self.heads = attention.num_kv_heads
        self.local_heads = self.heads // self.tensor_ranks
        self.router = Router(
            f"{name}.router", hidden, experts, attention.top_k, config.router_of("attention"), topology, dtype
        )
        multiple = row_multiple(options.fp8_recipe)
        self.dispatcher = DISPATCHERS[options.dispatcher](experts, engine, topology, sharded, multiple)
        self.query = kernels.grouped_linear(f"{name}.query", experts, hidden, width, engine, topology, sharded)
        self.output = kernels.grouped_linear(f"{name}.output", experts, width, hidden, engine, topology, sharded)
        self.kv = kernels.column_parallel(f"{name}.kv", (2, width, hidden), 1, engine, topology)
        self.core = kernels.attention(engine, topology)
        self.bias = output_bias(f"{name}.bias", hidden, topology, dtype) if attention.bias else None

    def forward(self, x_sbh: torch.Tensor, tokens: Tokens, cache: LayerCache | None = None) -> Steps[torch.Tensor]:
        x_th = x_sbh.flatten(0, 1)
        gates_tk, experts_tk, sent_tk = self.router(x_th, tokens)
        plan = self.dispatcher.plan(experts_tk, sent_tk)
        k_sbnd, v_sbnd = self._keys_and_values(x_sbh)  # while the counts of the other ranks come
        rows = yield from plan.dispatch_tokens(x_th)
        # Head j of any slot uses kv head j: the k slots of one head are one group.
        q_tnkd = yield from plan.collect_pairs(self.query(rows, plan.rows), self.heads)
        q_sbnkd = self._to_heads(q_tnkd, k_sbnd.shape[:2])
        o_sbnkd = attend(q_sbnkd, k_sbnd, v_sbnd, tokens, self.core, cache)
        rows = yield from plan.dispatch_pairs(self._to_sequence(o_sbnkd, q_tnkd.shape))
        out_th = yield from plan.collect_weighted(self.output(rows, plan.rows), gates_tk, self.bias)
        return out_th.view_as(x_sbh)

    def _keys_and_values(self, x_sbh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of this rank's heads over the whole sequence, ``[S, B, n / TP, d]`` each."""
        kv, _ = self.kv(x_sbh)
        return kv.view(*kv.shape[:2], 2, self.local_heads, self.head_dim).unbind(2)

    def _to_heads(self, q_tnkd: torch.Tensor, whole: torch.Size) -> torch.Tensor:
        """``[s * B, n, k, d]`` of this part of the sequence to ``[S, B, n / TP, k, d]`` of this rank's heads."""
        if self.tensor_ranks > 1:
            q_tnkd = all_to_all_sp2hp(q_tnkd.flatten(1))
        return q_tnkd.view(*whole, self.local_heads, self.top_k, self.head_dim)

    def _to_sequence(self, o_sbnkd: torch.Tensor, home: torch.Size) -> torch.Tensor:
        """The way back of :meth:`_to_heads`: ``[s * B, n, k, d]``."""
        if self.tensor_ranks > 1:
            o_sbnkd = all_to_all_hp2sp(o_sbnkd.flatten(2).flatten(0, 1))
        return o_sbnkd.reshape(home)


class GroupedQueryAttention(torch.nn.Module):
    """Groups of query heads over one head of keys and values each, with norms of queries and keys where asked for."""

    def __init__(self, name: str, config: ModelConfig, engine, topology: Topology, options: ModelOptions):
        super().__init__()
        attention, hidden = config.attention, config.hidden_size
        self.head_dim, self.group = attention.head_dim, attention.queries_per_kv_head
        self.local_heads = attention.num_kv_heads // topology.layout.tensor
        heads = (attention.num_kv_heads, self.group + 2, self.head_dim, hidden)
        kernels = kernels_of(options)
        self.qkv = kernels.column_parallel(f"{name}.qkv", heads, 0, engine, topology)
        self.output = kernels.row_parallel(f"{name}.output", (hidden, attention.width), engine, topology)
        self.core = kernels.attention(engine, topology)
        self.query_norm = self.key_norm = None
        if attention.qk_norm:
            norm = (config.layer_norm_eps, topology, options.dtype)
            self.query_norm = kernels.norm(f"{name}.query_norm", attention.width, *norm, split=True)
            self.key_norm = kernels.norm(f"{name}.key_norm", attention.kv_width, *norm, split=True)

    @without_waiting
    def forward(self, x_sbh: torch.Tensor, tokens: Tokens, cache: LayerCache | None = None) -> torch.Tensor:
        qkv, _ = self.qkv(x_sbh)
        qkv = qkv.view(*qkv.shape[:2], self.local_heads, self.group + 2, self.head_dim)
        q_sbngd, k_sbnd, v_sbnd = qkv[:, :, :, : self.group], qkv[:, :, :, self.group], qkv[:, :, :, self.group + 1]
        if self.query_norm is not None:
            q_sbngd = self.query_norm(q_sbngd.flatten(2)).view(q_sbngd.shape)
            k_sbnd = self.key_norm(k_sbnd.flatten(2)).view(k_sbnd.shape)
        # A copy of the values: the backward keeps them, and a view would keep the queries with them.
        o_sbngd = attend(q_sbngd, k_sbnd, v_sbnd.contiguous(), tokens, self.core, cache)
        return self.output(o_sbngd.flatten(2))[0]


ATTENTION = {"mixture": MixtureOfAttention, "gqa": GroupedQueryAttention}
"""``kind`` of a model's attention -> its module."""
