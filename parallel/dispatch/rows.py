"""The rows that each expert of a rank gets: how many, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch


class ExpertRows:
    """How many rows each expert of this rank receives, ``per_expert`` ``[E]`` on the device; ``to_host`` brings that to
    the host."""

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


def add_fillers(expert_p: torch.Tensor, count_e: torch.Tensor, multiple: int) -> torch.Tensor:
    """Append to the experts of rows, of which expert e has ``count_e[e]``, those of rows that are nobody's, so that
    each expert has a multiple of rows. There are ``(multiple - 1) x E`` of them; the expert of those that none needs is
    E."""
    experts = len(count_e)
    missing_fe = torch.arange(multiple - 1, device=count_e.device).unsqueeze(1) < -count_e % multiple
    each = torch.arange(experts, device=count_e.device)
    return torch.cat([expert_p, each.where(missing_fe, experts).reshape(-1)])


def sort_by_expert(expert_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the row at each place, the place of each row) with rows sorted by expert, and as they were within one."""
    order = torch.argsort(expert_p, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place
