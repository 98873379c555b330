"""All-gather: every rank gets the rows of all and keeps those of its experts.

An all-gather there and a reduce-scatter back, of sizes that everybody knows beforehand, in the place of two exchanges
of uneven parts. A rank receives (ranks - 1) x k rows for each of its tokens where the all-to-all has it receive (ranks
- 1) / ranks x k: docs/gpu.md says when that may pay.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from parallel.dispatch.alltoall import AllToAllDispatcher
from parallel.dispatch.moves import permute
from parallel.dispatch.rows import ExpertRows
from parallel.turns import without_waiting


class GatheredRows(ExpertRows):
    """Which of the rows of all ranks belong to the experts of this one.

    Args:
        count_re: ``[ranks, E]`` how many rows each rank has for each expert.
        first, held: the experts of this rank are ``held`` from ``first`` on.
        places: rows that each rank gives, nobody's at the end included.
    """

    def __init__(self, count_re: torch.Tensor, first: int, held: int, places: int):
        super().__init__(count_re[:, first : first + held].sum(0))
        ends_re = count_re.cumsum(1)
        row = torch.arange(places, device=count_re.device).expand(len(count_re), places).contiguous()
        key_rp = torch.searchsorted(ends_re, row, right=True) - first  # of experts here: 0 to held - 1
        self._held, self.places = held, places
        self._key = key_rp.masked_fill((key_rp < 0) | (key_rp > held), held).reshape(-1)

    @cached_property
    def index(self) -> torch.Tensor:
        """``[rows]`` the places of this rank's rows among those of all, sorted by expert; waits for the counts."""
        return torch.argsort(self._key, stable=True)[: sum(self.counts)]

    @cached_property
    def back(self) -> torch.Tensor:
        """``[ranks x places]`` the row of each place, ``len(index)`` for those of other ranks."""
        back = torch.full_like(self._key, len(self.index))
        back[self.index] = torch.arange(len(self.index), device=back.device)
        return back


class AllGatherDispatcher(AllToAllDispatcher):
    """The same trips as :class:`parallel.dispatch.alltoall.AllToAllDispatcher`."""

    def exchange_counts(self, count_e: torch.Tensor, places: int) -> ExpertRows:
        """Tell every rank how many rows each other has for each expert."""
        if self.ep_size == 1:
            return super().exchange_counts(count_e, places)
        count_re = gather_from_sequence_parallel_region(count_e, group=self.ep_group).view(self.ep_size, -1)
        self._sent = count_e
        return GatheredRows(count_re, self.local_expert_indices[0], self.num_local_experts, places)

    def rows_sent(self, received: ExpertRows) -> int:
        """How many rows this rank gives; waits for the counts."""
        return super().rows_sent(received) if self.ep_size == 1 else int(self._sent.sum())

    @without_waiting
    def send(self, rows: torch.Tensor, received: GatheredRows) -> torch.Tensor:
        """Rows sorted by global expert to rows of this rank's experts, sorted by local expert; waits for the counts."""
        if self.ep_size == 1:
            return rows
        everybodys = gather_from_sequence_parallel_region(
            F.pad(rows, (0, 0, 0, received.places - len(rows))), group=self.ep_group
        )
        return permute(everybodys, received.index, received.back, some_nobody_back=True)

    @without_waiting
    def send_back(self, rows: torch.Tensor, received: GatheredRows, sent: int) -> torch.Tensor:
        """The way back of :meth:`send`: each rank's answers, and zeros for what others answer, add up."""
        if self.ep_size == 1:
            return rows
        everybodys = permute(rows, received.back, received.index, some_nobody=True)
        return reduce_scatter_to_sequence_parallel_region(everybodys, group=self.ep_group)[:sent]
