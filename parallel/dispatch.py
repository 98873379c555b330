"""Send tokens to their experts and bring the answers home.

megatron-core's all-to-all dispatcher counts, splits, exchanges and sorts; what is ours is the local permutation on
either side of the exchange. A (token, slot) pair is a row of its own that comes back unsummed, because mixture-of-
attention needs the query of every slot separately; gates are applied at home. One plan, made from the router's choice,
serves every trip of a layer. A pair may be left out: it is not sent, and comes back as a row of zeros. Where matrix
products want a multiple of rows (FP8: 16), the sender adds rows of zeros for each expert, which are nobody's pair.

Rows are moved by gathers in both directions: the backward of a gather by a permutation is the gather by its inverse,
which unlike a scatter-add is deterministic on a GPU and fast on a CPU.
"""
from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from parallel.fuse import fused
from parallel.topology import Topology


class ExpertRows:
    """How many rows each expert of this rank receives, ``per_expert`` ``[E]`` on the device; ``to_host`` brings that to the
    host."""

    def __init__(self, per_expert: torch.Tensor, to_host: Callable[[], list[int]] | None = None):
        self.per_expert, self._to_host = per_expert, to_host or per_expert.tolist

    @cached_property
    def counts(self) -> list[int]:
        """The same as plain numbers; waits for the device when it is asked for the first time."""
        return self._to_host()

    @property
    def known_to_host(self) -> bool:
        """Whether :attr:`counts` has no need to wait."""
        return "counts" in self.__dict__ or not self.per_expert.is_cuda

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Where the rows of each expert end, int32 ``[E]`` on the device."""
        return self.per_expert.cumsum(0, dtype=torch.int32)


class RoutingPlan:
    """Where each pair goes, for the tokens of one micro-batch in one layer.

    With expert parallelism the first trip waits for the counts of the other ranks: what a layer can do before it, it
    had better do.

    Attributes:
        rows: how many rows each expert of this rank receives.
    """

    def __init__(self, dispatcher: "AllToAllDispatcher", experts_tk: torch.Tensor, sent_tk: torch.Tensor | None = None):
        self._dispatcher = dispatcher
        tokens, self.top_k = experts_tk.shape
        self._left_out, self._filled = sent_tk is not None, dispatcher.row_multiple > 1
        experts, self._pairs = dispatcher.num_experts, experts_tk.numel()
        chosen_te = torch.zeros(tokens, experts, dtype=torch.bool, device=experts_tk.device)
        chosen_te.scatter_(1, experts_tk, True if sent_tk is None else sent_tk)
        key_p = experts_tk.reshape(-1)
        if self._left_out:
            key_p = key_p.masked_fill(~sent_tk.reshape(-1), experts)
        if self._filled:
            filler_fe = _fillers(chosen_te.sum(0), dispatcher.row_multiple)
            chosen_te = torch.cat([chosen_te, filler_fe])
            each = torch.arange(experts, device=key_p.device)
            key_p = torch.cat([key_p, each.where(filler_fe, experts).reshape(-1)])
        self.rows = dispatcher.exchange_counts(chosen_te, len(key_p))
        self._sorted = torch.argsort(key_p, stable=True)  # what is not sent comes last
        self._place = torch.empty_like(self._sorted)
        self._place[self._sorted] = torch.arange(len(key_p), device=key_p.device)

    @cached_property
    def order(self) -> torch.Tensor:
        """``[R]`` the pair (token * k + slot) of each row that is sent, sorted by expert; T * k where it is nobody's."""
        order = self._sorted[: self._sent]
        return order.clamp(max=self._pairs) if self._filled else order

    @cached_property
    def inverse(self) -> torch.Tensor:
        """``[T * k]`` the row of each pair; R for one that is left out."""
        inverse = self._place[: self._pairs]
        return inverse.clamp(max=self._sent) if self._left_out else inverse

    @cached_property
    def _sent(self) -> int:
        """R, the rows that this rank sends."""
        return self._dispatcher.rows_sent(self.rows) if self._left_out or self._filled else self._pairs

    def dispatch_tokens(self, x_th: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` tokens to ``[rows, H]``: each token to each of its experts, rows sorted by expert."""
        rows = _GatherTokens.apply(x_th, self.order, self.inverse, self.top_k, self._filled, self._left_out)
        return self._dispatcher.send(rows, self.rows)

    def dispatch_pairs(self, x_tkd: torch.Tensor) -> torch.Tensor:
        """``[T, k, D]`` pairs to ``[rows, D]``: each pair to its own expert."""
        rows = permute(x_tkd.flatten(0, 1), self.order, self.inverse, self._filled, self._left_out)
        return self._dispatcher.send(rows, self.rows)

    def collect_pairs(self, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, D]`` answers of the experts to ``[T, k, D]``, at home and unsummed."""
        answers = self._dispatcher.send_back(rows, self.rows, len(self.order))
        pairs = permute(answers, self.inverse, self.order, self._left_out, self._filled)
        return pairs.unflatten(0, (-1, self.top_k))

    def collect_weighted(self, rows: torch.Tensor, gates_tk: torch.Tensor) -> torch.Tensor:
        """``[rows, H]`` answers to ``[T, H]``: the sum over the slots of gate times answer."""
        answers = self._dispatcher.send_back(rows, self.rows, len(self.order))
        return _WeightedSum.apply(answers, gates_tk, self.order, self.inverse, self._filled, self._left_out)


def _fillers(count_e: torch.Tensor, multiple: int) -> torch.Tensor:
    """``[multiple - 1, E]``: as many true in each column as that expert lacks to a multiple of rows."""
    missing_e = -count_e % multiple
    return torch.arange(multiple - 1, device=count_e.device).unsqueeze(1) < missing_e


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's all-to-all dispatcher over the experts of one layer.

    Args:
        num_experts: experts of the layer, over all ranks.
        config: the engine's TransformerConfig.
        topology: this rank's place.
        sharded: whether the experts are split over the expert-parallel ranks, or whole on every rank.
        row_multiple: what the rows of each expert are a multiple of.
    """

    def __init__(self, num_experts: int, config, topology: Topology, sharded: bool = True, row_multiple: int = 1):
        self.row_multiple = row_multiple
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

    def exchange_counts(self, chosen_re: torch.Tensor, places: int) -> ExpertRows:
        """Tell every rank how many rows come, from which row goes to which expert; nobody sends more than ``places``. With expert parallelism the numbers are
        on their way to the host, which has to wait for them before it can receive: the one synchronisation of a layer's
        half that dropless routing forces."""
        if self.ep_size == 1:
            return ExpertRows(chosen_re.sum(0))
        per_expert = self.preprocess(chosen_re)
        # One trip's state may be overwritten by the next layer's before its backward runs: autograd keeps the splits.
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", per_expert)
        return ExpertRows(per_expert, self._wait_for_counts)

    def _wait_for_counts(self) -> list[int]:
        for point in ("before_ep_alltoall", "before_permutation_2", "before_finish"):
            self._maybe_dtoh_and_synchronize(point, self.tokens_per_expert)
        return self.tokens_per_expert.tolist()

    def rows_sent(self, received: ExpertRows) -> int:
        """How many rows this rank sends; waits for the counts."""
        counts = received.counts
        return sum(counts) if self.ep_size == 1 else int(sum(self.input_splits))

    def send(self, rows: torch.Tensor, received: ExpertRows) -> torch.Tensor:
        """Rows sorted by global expert to rows of this rank's experts, sorted by local expert; waits for the counts."""
        if self.ep_size == 1:
            return rows
        received.counts  # noqa: B018  (from here on the splits are plain numbers)
        arrived = all_to_all(self.ep_group, rows, self.output_splits, self.input_splits)
        sorted_rows, _, _ = self.dispatch_postprocess(arrived, None)
        return sorted_rows

    def send_back(self, rows: torch.Tensor, received: ExpertRows, sent: int) -> torch.Tensor:
        """The way back of :meth:`send`, ``[sent, D]``."""
        return rows if self.ep_size == 1 else self.token_combine(self.combine_preprocess(rows))


def _take(rows: torch.Tensor, index: torch.Tensor, some_nobody: bool) -> torch.Tensor:
    """``rows[index]``; where there may be an index of ``len(rows)``, which stands for nobody, a row of zeros for it."""
    return (F.pad(rows, (0, 0, 0, 1)) if some_nobody else rows).index_select(0, index)


class _GatherTokens(torch.autograd.Function):
    """Row p of the result is token ``order[p] // k``."""

    @staticmethod
    def forward(ctx, x_th, order, inverse, top_k, filled, left_out):
        ctx.save_for_backward(inverse)
        ctx.top_k, ctx.left_out = top_k, left_out
        return _take(x_th, order if top_k == 1 else order // top_k, filled)

    @staticmethod
    def backward(ctx, grad_rows):
        (inverse,) = ctx.saved_tensors
        if ctx.left_out:
            grad_rows = F.pad(grad_rows, (0, 0, 0, 1))
        return _sum_of_slots(grad_rows, inverse.view(-1, ctx.top_k)), None, None, None, None, None


def permute(
    rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor, some_nobody: bool, some_nobody_back: bool
) -> torch.Tensor:
    """``rows[index]``, where ``back`` is the index of the way back. Each may point past its rows, to nobody's zeros, and is said to
    if it does."""
    return _Permute.apply(rows, index, back, some_nobody, some_nobody_back)


class _Permute(torch.autograd.Function):
    """Row p of the result is row ``index[p]``; ``back`` is the index of the way back. Each may point to nobody."""

    @staticmethod
    def forward(ctx, rows, index, back, some_nobody, some_nobody_back):
        ctx.save_for_backward(back)
        ctx.some_nobody = some_nobody_back
        return _take(rows, index, some_nobody)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return _take(grad, back, ctx.some_nobody), None, None, None, None


class _WeightedSum(torch.autograd.Function):
    """``sum_s gate[t, s] * rows[inverse[t * k + s]]`` without a ``[T, k, H]`` tensor."""

    @staticmethod
    def forward(ctx, rows, gates_tk, order, inverse, filled, left_out):
        ctx.save_for_backward(rows, gates_tk, order, inverse)
        ctx.filled, ctx.left_out = filled, left_out
        if left_out:
            rows = F.pad(rows, (0, 0, 0, 1))
        return _weighted_sum_of_slots(rows, gates_tk, inverse.view(gates_tk.shape))

    @staticmethod
    def backward(ctx, grad_th):
        rows, gates_tk, order, inverse = ctx.saved_tensors
        grads = _weighted_sum_backward(grad_th, rows, gates_tk, order, inverse, ctx.filled, ctx.left_out)
        return *grads, None, None, None, None


@fused
def _sum_of_slots(rows: torch.Tensor, slots_tk: torch.Tensor) -> torch.Tensor:
    """``sum_s rows[slots[t, s]]``, ``[T, H]``."""
    out = rows.index_select(0, slots_tk[:, 0])
    for slot in range(1, slots_tk.shape[1]):
        out += rows.index_select(0, slots_tk[:, slot])
    return out


@fused
def _weighted_sum_of_slots(rows: torch.Tensor, gates_tk: torch.Tensor, slots_tk: torch.Tensor) -> torch.Tensor:
    """``sum_s gate[t, s] * rows[slots[t, s]]``, ``[T, H]``."""
    out = rows.index_select(0, slots_tk[:, 0]).mul_(gates_tk[:, :1])
    for slot in range(1, slots_tk.shape[1]):
        out.addcmul_(rows.index_select(0, slots_tk[:, slot]), gates_tk[:, slot : slot + 1])
    return out


@fused
def _weighted_sum_backward(grad_th, rows, gates_tk, order, inverse, filled, left_out) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rows and gates."""
    grad_rows = _take(grad_th, order // gates_tk.shape[1], filled)
    grad_gates = torch.linalg.vecdot(grad_rows, rows).unsqueeze(1)
    grad_gates = _take(grad_gates, inverse, left_out).view_as(gates_tk)
    return grad_rows.mul_(_take(gates_tk.reshape(-1, 1), order, filled)), grad_gates
