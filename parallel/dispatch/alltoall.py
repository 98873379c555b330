"""megatron-core's all-to-all dispatcher: each rank gets the rows of its experts.

It counts, splits and sorts; what is ours is the exchange (:mod:`parallel.dispatch.travel`), which takes turns with
other computations, and the local permutation on either side of it. A pair may be left out: it is not sent, and comes
back as a row of zeros. Where matrix products want a multiple of rows (FP8: 16), the sender adds rows of zeros for each
expert, which are nobody's pair.
"""

from __future__ import annotations

from copy import copy
from functools import cached_property

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from parallel.dispatch.moves import gather_tokens, heads_to_rows, rows_to_heads, weighted_sum
from parallel.dispatch.rows import ExpertRows, add_fillers, sort_by_expert
from parallel.dispatch.travel import travel
from parallel.topology import Topology
from parallel.turns import Steps


class RoutingPlan:
    """Where each pair goes, for the tokens of one micro-batch in one layer.

    With expert parallelism the first trip, :meth:`dispatch_tokens`, waits for the counts of the other ranks: what a
    layer can do before it, it had better do.

    Attributes:
        rows: how many rows each expert of this rank receives.
    """

    def __init__(self, dispatcher: AllToAllDispatcher, experts_tk: torch.Tensor, sent_tk: torch.Tensor | None = None):
        dispatcher = self._dispatcher = copy(dispatcher)  # which has the sizes of one exchange at a time
        tokens, self.top_k = experts_tk.shape
        self._left_out, self._filled = sent_tk is not None, dispatcher.row_multiple > 1
        experts, self._pairs = dispatcher.num_experts, experts_tk.numel()
        chosen_te = torch.zeros(tokens, experts, dtype=torch.bool, device=experts_tk.device)
        chosen_te.scatter_(1, experts_tk, True if sent_tk is None else sent_tk)
        key_p = experts_tk.reshape(-1)
        if self._left_out:
            key_p = key_p.masked_fill(~sent_tk.reshape(-1), experts)
        count_e = chosen_te.sum(0)
        if self._filled:
            key_p = add_fillers(key_p, count_e, dispatcher.row_multiple)
            count_e += -count_e % dispatcher.row_multiple
        self.rows = dispatcher.exchange_counts(count_e, len(key_p))
        self._sorted, self._place = sort_by_expert(key_p)  # what is not sent comes last

    @cached_property
    def order(self) -> torch.Tensor:
        """``[R]`` the pair (token * k + slot) of each row that is sent, sorted by expert; T * k where it is
        nobody's."""
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

    def dispatch_tokens(self, x_th: torch.Tensor) -> Steps[torch.Tensor]:
        """``[T, H]`` tokens to ``[rows, H]``: each token to each of its experts, rows sorted by expert."""
        rows = gather_tokens(x_th, self.order, self.inverse, self.top_k, self._filled, self._left_out)
        return (yield from self._dispatcher.send(rows, self.rows))

    def dispatch_pairs(self, x_tnkd: torch.Tensor) -> Steps[torch.Tensor]:
        """``[T, n, k, d]`` pairs, of n heads each, to ``[rows, n * d]``: each pair to its own expert."""
        rows = heads_to_rows(x_tnkd, self.order, self.inverse, self._filled, self._left_out)
        return (yield from self._dispatcher.send(rows, self.rows))

    def collect_pairs(self, rows: torch.Tensor, heads: int) -> Steps[torch.Tensor]:
        """``[rows, n * d]`` answers of the experts, of n ``heads``, to ``[T, n, k, d]``, at home and unsummed."""
        answers = yield from self._dispatcher.send_back(rows, self.rows, len(self.order))
        return rows_to_heads(answers, heads, self.order, self.inverse, self.top_k, self._filled, self._left_out)

    def collect_weighted(
        self, rows: torch.Tensor, gates_tk: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Steps[torch.Tensor]:
        """``[rows, H]`` answers to ``[T, H]``: the sum over the slots of gate times answer, plus ``bias`` ``[H]``."""
        answers = yield from self._dispatcher.send_back(rows, self.rows, len(self.order))
        return weighted_sum(answers, gates_tk, bias, self.order, self.inverse, self._filled, self._left_out)


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

    def exchange_counts(self, count_e: torch.Tensor, places: int) -> ExpertRows:
        """Tell every rank how many rows come: this one sends ``count_e[e]`` to expert e, and nobody more than
        ``places``. With expert parallelism the numbers are on their way to the host, which has to wait for them before
        it can receive: the one synchronisation of a layer's half that dropless routing forces."""
        if self.ep_size == 1:
            return ExpertRows(count_e)
        per_expert = self.preprocess(count_e.unsqueeze(0))  # takes a map of who goes where, and adds it up
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

    def send(self, rows: torch.Tensor, received: ExpertRows) -> Steps[torch.Tensor]:
        """Rows sorted by global expert to rows of this rank's experts, sorted by local expert; waits for the counts."""
        if self.ep_size == 1:
            return rows
        received.counts  # noqa: B018  (from here on the splits are plain numbers)
        arrived = yield from self._travel(rows, self.output_splits, self.input_splits)
        sorted_rows, _, _ = self.dispatch_postprocess(arrived, None)
        return sorted_rows

    def send_back(self, rows: torch.Tensor, received: ExpertRows, sent: int) -> Steps[torch.Tensor]:
        """The way back of :meth:`send`, ``[sent, D]``."""
        if self.ep_size == 1:
            return rows
        return (yield from self._travel(self.combine_preprocess(rows), self.input_splits, self.output_splits))

    def _travel(self, rows: torch.Tensor, received, sent) -> Steps[torch.Tensor]:
        received, sent = ([int(count) for count in counts] for counts in (received, sent))
        return travel(rows, self.ep_group, received, sent)
