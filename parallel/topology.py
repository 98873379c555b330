"""Where this rank stands: its coordinates in the layout, its groups and its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel.layout import Layout


@dataclass(frozen=True)
class Topology:
    """This rank's place among the others.

    ``tensor_rank``, ``pipeline_rank``, ``data_rank`` and ``expert_rank`` count from 0 within the group of that name;
    ``groups`` are megatron-core's. Ranks with the same tensor and pipeline rank are replicas of each other's dense
    parameters; ``expert_data_rank`` numbers the replicas of this rank's experts.
    """

    layout: Layout
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    expert_rank: int
    expert_data_rank: int
    device: torch.device
    groups: ProcessGroupCollection

    @classmethod
    def current(cls, layout: Layout) -> Topology:
        """The topology of this process once megatron-core's groups are formed."""
        cuda = torch.cuda.is_available()
        return cls(
            layout=layout,
            rank=dist.get_rank(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            data_rank=parallel_state.get_data_parallel_rank(),
            expert_rank=parallel_state.get_expert_model_parallel_rank(),
            expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
            device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
            groups=ProcessGroupCollection.use_mpu_process_groups(),
        )

    @property
    def device_memory(self) -> int | None:
        """Bytes of this rank's GPU, or None on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    @property
    def virtual_stages(self) -> int:
        """Chunks of the model on each pipeline rank (1 without virtual pipeline stages)."""
        return self.layout.virtual_pipeline or 1

    @property
    def is_last_pipeline_rank(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1

    def stage_layers(self, num_layers: int, virtual_stage: int) -> range:
        """The global indices of the layers of one chunk: chunk v of rank p is stage v * PP + p of the pipeline."""
        per_stage = num_layers // (self.layout.pipeline * self.virtual_stages)
        first = (virtual_stage * self.layout.pipeline + self.pipeline_rank) * per_stage
        return range(first, first + per_stage)

    def is_first_stage(self, virtual_stage: int) -> bool:
        return self.pipeline_rank == 0 and virtual_stage == 0

    def is_last_stage(self, virtual_stage: int) -> bool:
        return self.is_last_pipeline_rank and virtual_stage == self.virtual_stages - 1

    # ---- what the training program asks of the other ranks

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def max_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of ``values`` over all ranks, element by element, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def sum_over_tensor_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share this rank's sequences, in place, outside of autograd."""
        if self.layout.tensor > 1:
            dist.all_reduce(values, group=self.groups.tp)
        return values

    def max_over_tensor_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over the tensor ranks, in place, outside of autograd."""
        if self.layout.tensor > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.groups.tp)
        return values

    def sum_over_expert_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share the experts of one model, in place."""
        dist.all_reduce(values, group=self.groups.ep)
        return values

    def gather_over_tensor_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """``[T, ...]`` of every tensor rank, alike in shape, one after the other along the first dimension; outside of
        autograd."""
        if self.layout.tensor == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.layout.tensor)]
        dist.all_gather(parts, values.contiguous(), group=self.groups.tp)
        return torch.cat(parts)

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Hand ``values`` of the last pipeline rank to the others of this pipeline, in place."""
        if self.layout.pipeline > 1:
            last = dist.get_process_group_ranks(self.groups.pp)[-1]
            dist.broadcast(values, src=last, group=self.groups.pp)
        return values

    def from_rank_zero(self, value: Any) -> Any:
        """Any picklable ``value`` of rank 0, on every rank."""
        if self.layout.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every rank, in rank order, on every rank."""
        if self.layout.world_size == 1:
            return [value]
        values = [None] * self.layout.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()
