"""The exchange itself: rows leave, another computation takes its turn, rows arrive; backward the other way."""

from __future__ import annotations

import torch
import torch.distributed as dist

from parallel.turns import Steps


def travel(rows: torch.Tensor, group: dist.ProcessGroup, received: list[int], sent: list[int]) -> Steps[torch.Tensor]:
    """``[sum(sent), D]`` rows to ``[sum(received), D]``: the first ``sent[0]`` go to rank 0 of the group, and so on;
    those that come from it come first. Yields while they are on their way."""
    trip = _Trip(group, received, sent)
    ticket = _Depart.apply(rows, trip)
    yield
    return _Arrive.apply(ticket, trip)


class _Trip:
    """One exchange there and, in the backward, one back. Keeps what is sent until the other ranks have it."""

    def __init__(self, group: dist.ProcessGroup, received: list[int], sent: list[int]):
        self._group, self._received, self._sent = group, received, sent
        self._under_way: tuple[dist.Work, torch.Tensor, torch.Tensor] | None = None

    def begin(self, rows: torch.Tensor, back: bool = False) -> None:
        to, of = (self._sent, self._received) if back else (self._received, self._sent)
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(to), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, rows, to, of, group=self._group, async_op=True)
        self._under_way = work, rows, arriving

    def end(self) -> torch.Tensor:
        """The rows that have arrived. A GPU's stream waits for them, the host does not."""
        (work, _, arrived), self._under_way = self._under_way, None
        work.wait()
        return arrived

    def ticket(self, rows: torch.Tensor) -> torch.Tensor:
        """What stands for the rows that arrive in autograd's graph while they travel: their shape, and no memory."""
        return rows.new_empty(()).expand(sum(self._received), *rows.shape[1:])


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, trip):
        ctx.trip = trip
        trip.begin(rows)
        return trip.ticket(rows)

    @staticmethod
    def backward(ctx, _):
        return ctx.trip.end(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, trip):
        ctx.trip = trip
        return trip.end()

    @staticmethod
    def backward(ctx, grad):
        ctx.trip.begin(grad, back=True)
        return ctx.trip.ticket(grad), None
