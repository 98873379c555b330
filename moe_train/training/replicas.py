"""Whether copies of one weight on several ranks are still the same: a broken device computes on and says nothing.

Ranks that hold the same rectangle of a parameter (data-parallel replicas, norms on every tensor rank, tied
embeddings) make the same updates to it, to the last bit. So their checksums are equal or something is broken."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from moe_train.errors import HardwareError

if TYPE_CHECKING:
    from moe_train.model.transformer import Transformer
    from parallel.topology import Topology

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Checksums = dict[tuple[str, tuple[int, ...]], int]
"""(parameter, offset in it) -> checksum"""


def check_replicas(chunks: list[Transformer], topology: Topology) -> None:
    """Compare the weights that several ranks hold. Every rank calls it; costs one pass over this rank's weights.

    Raises:
        HardwareError: some differ; names the parameter and the ranks.
    """
    if fault := what_differs(topology.gather(checksums(chunks))):
        raise HardwareError(fault)


def checksums(chunks: list[Transformer]) -> Checksums:
    """The sum of the bits, as integers, of every parameter of this rank; padding is left out."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    places = [(parameter.placement.name, tuple(parameter.placement.offset)) for parameter in parameters]
    sums = []
    for parameter in parameters:
        values = parameter.placement.valid(parameter.detach())
        sums.append(values.contiguous().view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64))
    return dict(zip(places, torch.stack(sums).tolist()))


def what_differs(ranks: list[Checksums]) -> str | None:
    """The first parameter of which the ranks' copies are not equal, and which ranks have another than most; None
    without one."""
    for place in dict.fromkeys(place for found in ranks for place in found):
        held = {rank: found[place] for rank, found in enumerate(ranks) if place in found}
        (usual, count), *others = Counter(held.values()).most_common()
        if not others:
            continue
        name = place[0]
        if count > others[0][1]:
            odd = [rank for rank, value in held.items() if value != usual]
            return f"{name} on {_ranks(odd)} is not what it is on {_ranks([r for r in held if r not in odd])}" + _ADVICE
        return f"{name} is not the same on {_ranks(list(held))}" + _ADVICE
    return None


_ADVICE = (
    ": copies of one weight have drifted apart, which a sound device does not do; exclude the node and resume from a"
    " checkpoint of before it began"
)


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else "ranks " + ", ".join(map(str, numbers))
