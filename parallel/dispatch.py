"""Send tokens to their experts and bring the answers home.

megatron-core's all-to-all dispatcher counts, splits, exchanges and sorts; what is ours is the local permutation on
either side of the exchange. A (token, slot) pair is a row of its own that comes back unsummed, because mixture-of-
attention needs the query of every slot separately; gates are applied at home. One plan, made from the router's choice,
serves every trip of a layer. A pair may be left out: it is not sent, and comes back as a row of zeros.

Rows are moved by gathers in both directions: the backward of a gather by a permutation is the gather by its inverse,
which unlike a scatter-add is deterministic on a GPU and fast on a CPU.
"""
from __future__ import annotations

from copy import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from parallel.topology import Topology


class ExpertRows:
    """How many rows each expert of this rank receives, ``per_expert`` ``[E]`` on the device."""

    def __init__(self, per_expert: torch.Tensor):
        self.per_expert = per_expert

    @cached_property
    def counts(self) -> list[int]:
        """The same as plain numbers; waits for the device when it is asked for the first time."""
        return self.per_expert.tolist()

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Where the rows of each expert end, int32 ``[E]`` on the device."""
        return self.per_expert.cumsum(0, dtype=torch.int32)


class RoutingPlan:
    """Where each pair goes, for the tokens of one micro-batch in one layer.

    Attributes:
        rows: how many rows each expert of this rank receives.
        order: ``[P]`` the pair (token * k + slot) at each position once the P pairs that are sent are sorted by expert.
        inverse: ``[T * k]`` the position of each pair; P for one that is left out.
    """

    def __init__(self, dispatcher: "ExpertDispatcher", experts_tk: torch.Tensor, sent_tk: torch.Tensor | None = None):
        self._dispatcher = dispatcher
        self.top_k = experts_tk.shape[1]
        pairs = experts_tk.reshape(-1)
        if sent_tk is None:
            self.order = torch.argsort(pairs, stable=True)
            self.inverse = torch.empty_like(self.order)
        else:
            left_out_last = pairs.masked_fill(~sent_tk.reshape(-1), dispatcher.num_experts)
            self.order = torch.argsort(left_out_last, stable=True)[: int(sent_tk.sum())]
            self.inverse = torch.full_like(pairs, len(self.order))
        self.inverse[self.order] = torch.arange(len(self.order), device=pairs.device)
        self.rows = dispatcher.exchange_counts(experts_tk, sent_tk)

    def dispatch_tokens(self, x_th: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` tokens to ``[rows, H]``: each token to each of its experts, rows sorted by expert."""
        return self._dispatcher.send(_GatherTokens.apply(x_th, self.order, self.inverse, self.top_k))

    def dispatch_pairs(self, x_tkd: torch.Tensor) -> torch.Tensor:
        """``[T, k, D]`` pairs to ``[rows, D]``: each pair to its own expert."""
        return self._dispatcher.send(_Permute.apply(x_tkd.flatten(0, 1), self.order, self.inverse))

    def collect_pairs(self, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, D]`` answers of the experts to ``[T, k, D]``, at home and unsummed."""
        pairs = _Permute.apply(self._dispatcher.send_back(rows), self.inverse, self.order)
        return pairs.unflatten(0, (-1, self.top_k))

    def collect_weighted(self, rows: torch.Tensor, gates_tk: torch.Tensor) -> torch.Tensor:
        """``[rows, H]`` answers to ``[T, H]``: the sum over the slots of gate times answer."""
        return _WeightedSum.apply(self._dispatcher.send_back(rows), gates_tk, self.order, self.inverse)


class ExpertDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's all-to-all dispatcher over the experts of one layer.

    Args:
        num_experts: experts of the layer, over all ranks.
        config: the engine's TransformerConfig.
        topology: this rank's place.
        sharded: whether the experts are split over the expert-parallel ranks, or whole on every rank.
    """

    def __init__(self, num_experts: int, config, topology: Topology, sharded: bool = True):
        groups = topology.groups
        if not sharded:
            groups = ProcessGroupCollection()
            groups.ep = groups.expt_tp = groups.tp_ep = topology.groups.expt_tp  # expert tensor parallelism is 1: alone
        ranks = groups.ep.size()
        per_rank = num_experts // ranks
        first = groups.ep.rank() * per_rank
        config = copy(config)
        config.num_moe_experts = num_experts
        super().__init__(per_rank, list(range(first, first + per_rank)), config, pg_collection=groups)

    def plan(self, experts_tk: torch.Tensor, sent_tk: torch.Tensor | None = None) -> RoutingPlan:
        """The routing plan for ``experts_tk`` ``[T, k]``, the experts of each token; ``sent_tk`` says which of these
        pairs are sent, None: all. Exchanges the counts."""
        return RoutingPlan(self, experts_tk, sent_tk)

    def exchange_counts(self, experts_tk: torch.Tensor, sent_tk: torch.Tensor | None) -> ExpertRows:
        """Tell every rank how many rows come. With expert parallelism the host waits for the numbers, which say how
        large what it receives is: the one synchronisation of a layer's half that dropless routing forces."""
        chosen = torch.zeros(len(experts_tk), self.num_experts, dtype=torch.bool, device=experts_tk.device)
        chosen.scatter_(1, experts_tk, True if sent_tk is None else sent_tk)
        if self.ep_size == 1:
            return ExpertRows(chosen.sum(0))
        self.tokens_per_expert = self.preprocess(chosen)
        rows = ExpertRows(self.tokens_per_expert)
        for point in ("before_permutation_1", "before_ep_alltoall", "before_permutation_2", "before_finish"):
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(point, self.tokens_per_expert)
        # One trip's state may be overwritten by the next layer's before its backward runs: autograd keeps the splits.
        rows.counts = self.tokens_per_expert.tolist()
        return rows

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows sorted by global expert to rows of this rank's experts, sorted by local expert."""
        if self.ep_size == 1:
            return rows
        received, _ = self.token_dispatch(rows, rows.new_empty(len(rows), 0))
        sorted_rows, _, _ = self.dispatch_postprocess(received, None)
        return sorted_rows

    def send_back(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back of :meth:`send`."""
        return rows if self.ep_size == 1 else self.token_combine(self.combine_preprocess(rows))


def _with_zero_row(rows: torch.Tensor, places: int) -> torch.Tensor:
    """``rows``, and a row of zeros where pairs that were left out look, which are those of ``places`` that have no
    row."""
    return rows if len(rows) == places else F.pad(rows, (0, 0, 0, 1))


class _GatherTokens(torch.autograd.Function):
    """Row p of the result is token ``order[p] // k``."""

    @staticmethod
    def forward(ctx, x_th, order, inverse, top_k):
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x_th.index_select(0, order if top_k == 1 else order // top_k)

    @staticmethod
    def backward(ctx, grad_rows):
        (inverse,) = ctx.saved_tensors
        grad_rows = _with_zero_row(grad_rows, len(inverse))
        slots = inverse.view(-1, ctx.top_k)
        grad = grad_rows.index_select(0, slots[:, 0])
        for slot in range(1, ctx.top_k):
            grad += grad_rows.index_select(0, slots[:, slot])
        return grad, None, None, None


class _Permute(torch.autograd.Function):
    """Row p of the result is row ``order[p]``; ``inverse`` undoes it. There are as many ``pairs`` as rows on one side;
    on the other those that were left out are missing, and come back as zeros."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        ctx.pairs = max(len(order), len(inverse))
        return _with_zero_row(rows, ctx.pairs).index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return _with_zero_row(grad, ctx.pairs).index_select(0, inverse), None, None


class _WeightedSum(torch.autograd.Function):
    """``sum_s gate[t, s] * rows[inverse[t * k + s]]`` without a ``[T, k, H]`` tensor."""

    @staticmethod
    def forward(ctx, rows, gates_tk, order, inverse):
        ctx.save_for_backward(rows, gates_tk, order, inverse)
        rows = _with_zero_row(rows, len(inverse))
        slots = inverse.view(gates_tk.shape)
        out = rows.index_select(0, slots[:, 0]).mul_(gates_tk[:, :1])
        for slot in range(1, gates_tk.shape[1]):
            out.addcmul_(rows.index_select(0, slots[:, slot]), gates_tk[:, slot : slot + 1])
        return out

    @staticmethod
    def backward(ctx, grad_th):
        rows, gates_tk, order, inverse = ctx.saved_tensors
        top_k = gates_tk.shape[1]
        grad_rows = grad_th.index_select(0, order // top_k)
        grad_gates = torch.linalg.vecdot(grad_rows, rows)
        grad_gates = _with_zero_row(grad_gates.unsqueeze(1), len(inverse)).index_select(0, inverse).view_as(gates_tk)
        grad_rows.mul_(gates_tk.reshape(-1, 1).index_select(0, order))
        return grad_rows, grad_gates, None, None
