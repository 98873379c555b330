"""DeepEP's kernels, where DeepEP is installed: rows go from one GPU's memory to another's without NCCL.

DeepEP sends tokens as they lie and sums what comes back of each, so a pair is a token of its own here, which has one
expert. Nothing is sorted at home: neighbours in memory go to different ranks, which keeps all of DeepEP's channels
busy. Rows are sorted where they arrive, and filled up there to the multiple that matrix products want.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe import fused_a2a

from parallel.dispatch.alltoall import AllToAllDispatcher, RoutingPlan
from parallel.dispatch.moves import permute, weighted_sum
from parallel.dispatch.rows import ExpertRows, add_fillers, sort_by_expert
from parallel.errors import EngineError
from parallel.turns import without_waiting


class FlexDispatcher(AllToAllDispatcher):
    """The same trips as :class:`parallel.dispatch.alltoall.AllToAllDispatcher`, which this is where no rank shares the
    experts.

    Raises:
        EngineError: DeepEP is not installed, or has no kernels for what it is to send.
    """

    def __init__(self, num_experts: int, config, *arguments, **options):
        super().__init__(num_experts, config, *arguments, **options)
        if self.ep_size == 1:
            return
        if not fused_a2a.HAVE_DEEP_EP:
            raise EngineError(
                "parallel.dispatcher: flex needs DeepEP 1 (github.com/deepseek-ai/DeepEP, tag v1.2.1, from source), "
                "and megatron-core finds none: install it, or take alltoall"
            )
        if config.params_dtype != torch.bfloat16:
            raise EngineError("parallel.dispatcher: flex sends bf16 only: set training.precision to bf16 or fp8")
        try:
            fused_a2a.Buffer.get_dispatch_config(self.ep_size)
        except AssertionError as error:
            raise EngineError(f"parallel.dispatcher: flex is not for {self.ep_size} expert ranks: {error}") from error

    def plan(self, experts_tk: torch.Tensor, sent_tk: torch.Tensor | None = None) -> RoutingPlan | FlexPlan:
        """The routing plan for ``experts_tk`` ``[T, k]``; ``sent_tk`` says which of these pairs are sent, None: all."""
        return super().plan(experts_tk, sent_tk) if self.ep_size == 1 else FlexPlan(self, experts_tk, sent_tk)


class FlexPlan:
    """The trips of :class:`parallel.dispatch.alltoall.RoutingPlan`. The first one waits for the counts of the other
    ranks."""

    rows: ExpertRows
    """How many rows each expert of this rank has received; known after the first trip."""

    def __init__(self, dispatcher: FlexDispatcher, experts_tk: torch.Tensor, sent_tk: torch.Tensor | None):
        expert_tk = experts_tk if sent_tk is None else experts_tk.masked_fill(~sent_tk, -1)
        self.top_k = experts_tk.shape[1]
        self._exchange = _Exchange(dispatcher, expert_tk.reshape(-1, 1))
        self._held, self._multiple = dispatcher.num_local_experts, dispatcher.row_multiple

    @without_waiting
    def dispatch_tokens(self, x_th: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` tokens to ``[rows, H]``: each token to each of its experts, rows sorted by expert."""
        return self._send(x_th.unsqueeze(1).expand(-1, self.top_k, -1).flatten(0, 1))

    @without_waiting
    def dispatch_pairs(self, x_tnkd: torch.Tensor) -> torch.Tensor:
        """``[T, n, k, d]`` pairs, of n heads each, to ``[rows, n * d]``: each pair to its own expert."""
        return self._send(x_tnkd.transpose(1, 2).flatten(2).flatten(0, 1))

    @without_waiting
    def collect_pairs(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        """``[rows, n * d]`` answers of the experts, of n ``heads``, to ``[T, n, k, d]``, at home and unsummed."""
        answers = self._send_back(rows)
        return answers.view(-1, self.top_k, heads, answers.shape[1] // heads).transpose(1, 2)

    @without_waiting
    def collect_weighted(
        self, rows: torch.Tensor, gates_tk: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[rows, H]`` answers to ``[T, H]``: the sum over the slots of gate times answer, plus ``bias`` ``[H]``."""
        answers = self._send_back(rows)
        as_they_lie = torch.arange(len(answers), device=answers.device)
        return weighted_sum(answers, gates_tk, bias, as_they_lie, as_they_lie)

    def _send(self, pairs: torch.Tensor) -> torch.Tensor:
        first = self._exchange.handle is None
        arrived = _Send.apply(pairs, self._exchange)
        if first:
            self._sort(self._exchange.arrived_expert)
        return permute(arrived, self._order, self._place, some_nobody=self._multiple > 1)

    def _send_back(self, rows: torch.Tensor) -> torch.Tensor:
        answers = permute(rows, self._place, self._order, some_nobody_back=self._multiple > 1)
        return _SendBack.apply(answers, self._exchange)

    def _sort(self, expert_n: torch.Tensor) -> None:
        """From the experts of the rows that arrived to the order in which these take them."""
        arrived, key_p = len(expert_n), expert_n
        count_e = (expert_n.unsqueeze(1) == torch.arange(self._held, device=expert_n.device)).sum(0)
        if self._multiple > 1:
            key_p = add_fillers(key_p, count_e, self._multiple)
            count_e += -count_e % self._multiple
        self.rows = ExpertRows(count_e)
        self.rows.counts = self._exchange.counts
        order, place = sort_by_expert(key_p)
        self._order, self._place = order[: sum(self.rows.counts)].clamp(max=arrived), place[:arrived]


class _Exchange:
    """The pairs of a plan, there and back. What DeepEP finds out in the first trip serves all others.

    Args:
        expert_p1: ``[P, 1]`` the expert of each pair, -1: it is not sent, and comes back as zeros.
    """

    def __init__(self, dispatcher: FlexDispatcher, expert_p1: torch.Tensor):
        self._group, self._experts = dispatcher.ep_group, dispatcher.num_experts
        self._multiple = dispatcher.row_multiple
        self._expert_p1 = expert_p1
        self.handle = None
        self.arrived_expert: torch.Tensor
        """``[N]`` which expert of this rank each row is for."""
        self.counts: list[int]
        """Rows of each expert of this rank, filled up to the multiple."""

    def there(self, pairs: torch.Tensor) -> torch.Tensor:
        """``[P, D]`` pairs to ``[N, D]`` rows."""
        buffer, pairs = self._buffer(pairs), pairs.contiguous()
        if self.handle is not None:
            return buffer.dispatch(pairs, handle=self.handle)[0]
        to_rank, to_node, to_expert, goes_pr, _ = buffer.get_dispatch_layout(self._expert_p1, self._experts)
        rows, arrived_n1, _, self.counts, self.handle, _ = buffer.dispatch(
            pairs,
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            is_token_in_rank=goes_pr,
            num_tokens_per_expert=to_expert,
            topk_idx=self._expert_p1,
            topk_weights=torch.ones_like(self._expert_p1, dtype=torch.float32),
            expert_alignment=self._multiple,
        )
        self.arrived_expert = arrived_n1.squeeze(1)
        return rows

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """``[N, D]`` rows to ``[P, D]`` pairs."""
        return self._buffer(rows).combine(rows.contiguous(), self.handle)[0]

    def _buffer(self, rows: torch.Tensor):
        return fused_a2a.get_buffer(self._group, fused_a2a.get_hidden_bytes(rows))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pairs, exchange):
        ctx.exchange = exchange
        return exchange.there(pairs)

    @staticmethod
    def backward(ctx, grad_rows):
        return ctx.exchange.back(grad_rows), None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange):
        ctx.exchange = exchange
        return exchange.back(rows)

    @staticmethod
    def backward(ctx, grad_pairs):
        return ctx.exchange.there(grad_pairs), None
