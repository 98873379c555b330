"""Hand tensors from stage to stage outside of training: a forward pass without a schedule.

Each rank of a pipeline receives from the one before, computes, and sends to the one after; several
micro-batches in a row overlap by themselves. Without virtual stages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.topology import Topology


def through_stages(
    stage: Callable[[torch.Tensor | None], torch.Tensor],
    topology: Topology,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Run this rank's ``stage`` between its neighbours.

    Args:
        stage: from what the previous stage sent (None on the first) to what the next one receives, or on
            the last stage, to the result.
        shape: of what is handed on, the same between all stages.
        dtype: of what is handed on.

    Returns the result on the ranks of the last stage, None elsewhere.
    """
    ranks = dist.get_process_group_ranks(topology.groups.pp)
    here = topology.pipeline_rank
    received = None
    if here > 0:
        received = torch.empty(shape, dtype=dtype, device=topology.device)
        dist.recv(received, src=ranks[here - 1], group=topology.groups.pp)
    output = stage(received)
    if topology.is_last_pipeline_rank:
        return output
    if tuple(output.shape) != tuple(shape) or output.dtype != dtype:
        raise ValueError(
            f"a stage gave {output.dtype} {tuple(output.shape)}, the next one expects {dtype} {tuple(shape)}"
        )
    dist.send(output.contiguous(), dst=ranks[here + 1], group=topology.groups.pp)
    return None


def from_one_of_last_stage(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Hand ``values`` of the first rank of the last stage to every rank of the world, in place.

    Replicas of a model may differ in the last bits of what they compute; what all must agree on comes
    from one.
    """
    layout = topology.layout
    if layout.world_size > 1:
        stage = layout.tensor * layout.data  # stages are blocks of ranks
        dist.broadcast(values, src=layout.world_size - stage)
    return values
