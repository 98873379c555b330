"""How many ranks do what: tensor, pipeline, expert and data parallelism, and the check that they divide the
model and the batch.

World = tensor x pipeline x data. Expert parallelism takes no ranks of its own: it divides tensor x data, and
expert tensor parallelism stays 1 (an expert lives whole on one rank). Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from parallel.errors import LayoutError


class ParallelConfig(BaseModel):
    """The section `parallel` of a run file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    tensor: int = Field(1, ge=1)
    """Ranks that split each layer's heads and the vocabulary (with sequence parallelism); divides the number
    of kv heads."""
    pipeline: int = Field(1, ge=1)
    """Stages of consecutive layers; with `virtual_pipeline` it divides the number of layers."""
    virtual_pipeline: int | None = Field(None, ge=1)
    """Pieces of the model on each stage (interleaved schedule); null or 1: none."""
    expert: int = Field(1, ge=1)
    """Ranks that share the experts of a layer; divides tensor x data and the number of experts."""
    attention_experts: Literal["sharded", "replicated"] = "sharded"
    """With expert parallelism: attention experts split like those of the MLP, or kept whole on every rank."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """With expert parallelism: each rank gets the rows of its experts alone, or those of all ranks and keeps its own,
    or those of its experts by DeepEP's kernels."""
    overlap_dispatch: bool = False
    """With expert parallelism and `alltoall`: micro-batches go through the model two at a time, and one computes while
    the other's rows are on their way. Takes the memory of both."""

    @property
    def in_turn(self) -> int:
        """Micro-batches that go through the model together."""
        return _in_turn(self.overlap_dispatch, self.expert)


def _in_turn(overlap_dispatch: bool, expert: int) -> int:
    return 2 if overlap_dispatch and expert > 1 else 1


@dataclass(frozen=True)
class Layout:
    """A layout that divides everything it must. `virtual_pipeline` is None unless it is 2 or more."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    expert: int
    data: int

    @property
    def expert_data(self) -> int:
        """Replicas of each expert: tensor x data / expert."""
        return self.tensor * self.data // self.expert

    def describe(self) -> str:
        """One line for people: ``4 ranks = tensor 2 x pipeline 1 x data 2; experts over 2 of tensor x
        data``."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        text = f"{ranks} = tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"
        if self.virtual_pipeline:
            text += f"; {self.virtual_pipeline} virtual stages a rank"
        if self.expert > 1:
            text += f"; experts over {self.expert} ranks of tensor x data"
        return text


@dataclass(frozen=True)
class _Problem:
    """What a layout must divide, with the layout itself: everything that the rules look at."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    expert: int
    num_layers: int
    num_kv_heads: int
    attention_experts: int
    mlp_experts: int
    dense_ffn_size: int | None
    micro_batch_size: int
    global_batch_size: int
    replicated: bool
    overlap: bool

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline)

    @property
    def multiple(self) -> int:
        """What the number of a data rank's micro-batches is a multiple of."""
        return _in_turn(self.overlap, self.expert) * (self.pipeline if self.virtual > 1 else 1)

    def violation(self) -> tuple[str, str] | None:
        """The first rule that does not hold: (what to change, the reason)."""
        if self.tensor > self.num_kv_heads or self.num_kv_heads % self.tensor:
            return (
                "tensor",
                f"parallel.tensor {self.tensor} does not divide the {self.num_kv_heads} kv heads",
            )
        if self.dense_ffn_size is not None and self.dense_ffn_size % self.tensor:
            return (
                "tensor",
                f"parallel.tensor {self.tensor} does not divide the MLP's width {self.dense_ffn_size}",
            )
        if self.virtual > 1 and self.pipeline == 1:
            return "virtual", f"parallel.virtual_pipeline {self.virtual} needs parallel.pipeline of 2 or more"
        if self.num_layers % self.pipeline:
            return (
                "pipeline",
                f"parallel.pipeline {self.pipeline} does not divide the {self.num_layers} layers",
            )
        if self.num_layers % (self.pipeline * self.virtual):
            chunks = self.pipeline * self.virtual
            return "virtual", (
                f"parallel.pipeline {self.pipeline} x parallel.virtual_pipeline {self.virtual} = {chunks}"
                f" does not divide the {self.num_layers} layers"
            )
        ranks = self.tensor * self.pipeline
        if self.world % ranks:
            product = f"parallel.tensor {self.tensor} x parallel.pipeline {self.pipeline} = {ranks}"
            return "world", f"{product} does not divide the {self.world} processes"
        return self._violation_of_experts() or self._violation_of_batch()

    def _violation_of_experts(self) -> tuple[str, str] | None:
        shared = self.mlp_experts or (0 if self.replicated else self.attention_experts)
        if self.expert > 1 and not shared:
            return "expert", f"parallel.expert {self.expert} has no experts of this model to share out"
        if self.mlp_experts % self.expert:
            return (
                "expert",
                f"parallel.expert {self.expert} does not divide the {self.mlp_experts} MLP experts",
            )
        if not self.replicated and self.attention_experts % self.expert:
            experts = f"the {self.attention_experts} attention experts"
            return (
                "expert",
                f"parallel.expert {self.expert} does not divide {experts}"
                " (parallel.attention_experts: replicated keeps them whole)",
            )
        ranks = self.tensor * self.data
        if ranks % self.expert:
            product = f"tensor {self.tensor} x data {self.data} = {ranks}"
            world = f"{self.world} process{'es' * (self.world > 1)}"
            return "expert", f"parallel.expert {self.expert} does not divide {product} ({world})"
        return None

    def _violation_of_batch(self) -> tuple[str, str] | None:
        sequences = self.micro_batch_size * self.data
        if self.global_batch_size % sequences:
            product = f"micro_batch_size {self.micro_batch_size} x data {self.data} = {sequences}"
            return (
                "batch",
                f"training.global_batch_size {self.global_batch_size} is not a multiple of {product}",
            )
        per_rank = self.global_batch_size // sequences
        if per_rank % self.multiple:
            need = f"the interleaved schedule needs a multiple of parallel.pipeline {self.pipeline}"
            if self.virtual == 1:
                need = "parallel.overlap_dispatch takes them two at a time"
            elif self.multiple > self.pipeline:
                need += ", twice that with parallel.overlap_dispatch"
            return "batch", (
                f"training.global_batch_size {self.global_batch_size} gives each data rank {per_rank}"
                f" micro-batch(es), and {need}"
            )
        return None


def resolve_layout(
    parallel: ParallelConfig,
    world_size: int,
    *,
    num_layers: int,
    num_kv_heads: int,
    attention_experts: int,
    mlp_experts: int,
    dense_ffn_size: int | None = None,
    micro_batch_size: int,
    global_batch_size: int,
) -> Layout:
    """The layout of `world_size` ranks; the two batch sizes are in sequences.

    Numbers of experts are 0 where attention or MLP is no mixture; `dense_ffn_size` is then the width of the MLP.

    Vocabulary and sequence length need not divide: both are padded inside.

    Raises LayoutError, one line with the reason and the nearest change that would do.
    """
    if world_size < 1:
        raise LayoutError(f"a run needs at least 1 process, not {world_size}")
    problem = _Problem(
        world=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline or 1,
        expert=parallel.expert,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        attention_experts=attention_experts,
        mlp_experts=mlp_experts,
        dense_ffn_size=dense_ffn_size,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        replicated=parallel.attention_experts == "replicated",
        overlap=parallel.overlap_dispatch,
    )
    violation = problem.violation()
    if violation is not None:
        what, reason = violation
        raise LayoutError(f"{reason}; {_remedy(problem, what)}")
    return Layout(
        world_size=world_size,
        tensor=problem.tensor,
        pipeline=problem.pipeline,
        virtual_pipeline=problem.virtual if problem.virtual > 1 else None,
        expert=problem.expert,
        data=problem.data,
    )


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest ranks on which `parallel` can run: the smallest multiple of tensor x pipeline whose tensor x
    data holds expert."""
    return parallel.pipeline * math.lcm(parallel.tensor, parallel.expert)


# --- the nearest that would do ------------------------------------------------------------------------------

_KEYS = {
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "virtual": "parallel.virtual_pipeline",
    "expert": "parallel.expert",
}


def _remedy(problem: _Problem, what: str) -> str:
    for candidate in _single_changes(problem, what):
        if candidate.violation() is None:
            return f"the nearest that would do: {_difference(problem, candidate)}"
    candidates = [layout for layout in _all_layouts(problem) if layout.violation() is None]
    if candidates:
        nearest = min(candidates, key=lambda layout: _distance(problem, layout))
        return f"the nearest that would do: {_difference(problem, nearest)}"
    for candidate in _single_changes(problem, "world"):
        if candidate.violation() is None:
            return f"the nearest that would do: {_difference(problem, candidate)}"
    return f"no layout of {problem.world} processes would do: choose another number of processes or batch size"


def _single_changes(problem: _Problem, what: str) -> Iterator[_Problem]:
    """The problem with `what` alone changed, nearest first (of two as near, the smaller)."""
    if what == "world":
        ranks = problem.tensor * problem.pipeline
        below = problem.world // ranks
        for world in sorted(
            (ranks * n for n in range(1, below + problem.expert + 2)), key=lambda n: abs(n - problem.world)
        ):
            yield replace(problem, world=world)
    elif what == "batch":
        unit = problem.micro_batch_size * problem.data * problem.multiple
        below = problem.global_batch_size // unit * unit
        for batch in sorted((below, below + unit), key=lambda size: abs(size - problem.global_batch_size)):
            if batch:
                yield replace(problem, global_batch_size=batch)
    else:
        now = getattr(problem, what)
        experts = problem.mlp_experts or problem.attention_experts
        limit = {"tensor": problem.num_kv_heads, "expert": experts or 1}.get(what, problem.num_layers)
        for value in sorted(range(1, limit + 1), key=lambda value: (abs(value - now), value)):
            yield replace(problem, **{what: value})


def _all_layouts(problem: _Problem) -> Iterator[_Problem]:
    for tensor in _divisors(problem.world):
        for pipeline in _divisors(problem.world // tensor):
            for expert in _divisors(problem.world // pipeline):
                for virtual in {1, problem.virtual} if pipeline > 1 else {1}:
                    yield replace(problem, tensor=tensor, pipeline=pipeline, virtual=virtual, expert=expert)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _distance(problem: _Problem, candidate: _Problem) -> tuple[float, tuple[int, ...]]:
    """In factors: going from 4 to 2 is as far as from 2 to 1; ties are broken the same way everywhere."""
    values = [(getattr(problem, name), getattr(candidate, name)) for name in _KEYS]
    return sum(abs(math.log2(now / then)) for now, then in values), tuple(then for _, then in values)


def _difference(problem: _Problem, candidate: _Problem) -> str:
    changes = [
        f"{key}: {getattr(candidate, name)}"
        for name, key in _KEYS.items()
        if getattr(problem, name) != getattr(candidate, name)
    ]
    if candidate.world != problem.world:
        changes.append(f"{candidate.world} processes" if candidate.world > 1 else "1 process")
    if candidate.global_batch_size != problem.global_batch_size:
        changes.append(f"training.global_batch_size: {candidate.global_batch_size}")
    return ", ".join(changes)
