"""Which parameters each rank of a layout holds, and how the distributed optimizer splits what it keeps of
them.

Mirrors `moe_train.model` (which rank holds which rectangle) and megatron-core 0.16's gradient buffers:
parameters start at multiples of 64 elements, buckets end at multiples of lcm(data ranks, 128). A test
compares every byte with what the engine allocates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from moe_train.model.config import ModelConfig
from moe_train.model.flops import layer_weights
from parallel.layout import Layout

BUCKET_SIZE = 40_000_000
"""Elements of a bucket where the reduction of gradients overlaps the backward pass (GPUs)."""


@dataclass(frozen=True)
class Place:
    """The coordinates of a rank. Stages are blocks of tensor x data ranks, tensor ranks next to each
    other."""

    rank: int
    tensor: int
    data: int
    stage: int
    expert: int
    expert_data: int


def place(layout: Layout, rank: int) -> Place:
    """Where `rank` stands."""
    stage, within = divmod(rank, layout.tensor * layout.data)
    data, tensor = divmod(within, layout.tensor)
    expert_data, expert = divmod(within, layout.expert)
    return Place(rank, tensor, data, stage, expert, expert_data)


def places(layout: Layout) -> Iterator[Place]:
    """Every rank of a layout, in order."""
    return (place(layout, rank) for rank in range(layout.world_size))


@dataclass(frozen=True)
class Parameter:
    """A parameter as one rank holds it: `size` elements, padding of the vocabulary included."""

    name: str
    size: int
    expert: bool = False
    """Split over the expert-parallel ranks: its replicas are the expert-data ranks."""
    own_bucket: bool = False
    """A tied embedding on two stages: both must split its optimizer state alike."""


def chunk_parameters(
    model: ModelConfig, layout: Layout, stage: int, chunk: int, sharded_attention: bool = True
) -> list[Parameter]:
    """The parameters of one chunk of the model on a stage, in the order in which the module lists them.

    Every tensor and expert rank holds as many elements, so only stage and chunk matter.
    """
    hidden = model.hidden_size
    chunks = layout.virtual_pipeline or 1
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline - 1 and chunk == chunks - 1
    vocabulary = -(-model.vocab_size // layout.tensor) * hidden
    alone = model.tie_embeddings and layout.pipeline > 1
    parts = {"whole": 1, "tensor": layout.tensor, "expert": layout.expert}
    result = []
    if last and not (model.tie_embeddings and first):
        result.append(Parameter("head.weight", vocabulary, own_bucket=alone))
    if first:
        result.append(Parameter("embedding.weight", vocabulary, own_bucket=alone))
    per_chunk = model.num_layers // (layout.pipeline * chunks)
    begin = (chunk * layout.pipeline + stage) * per_chunk
    for layer in range(begin, begin + per_chunk):
        for name, (shape, split) in layer_weights(model, layer).items():
            if split == "expert" and not sharded_attention and ".attention." in name:
                split = "whole"
            result.append(Parameter(name, math.prod(shape) // parts[split], expert=split == "expert"))
    if last:
        result.append(Parameter("final_norm.weight", hidden))
    return result


@lru_cache(maxsize=16)
def product_elements(model: ModelConfig, layout: Layout, stage: int, sharded_attention: bool = True) -> int:
    """Elements of a stage's weights that matrix products in FP8 take: of the layers, not of routers and gates."""
    return sum(
        parameter.size
        for chunk in range(layout.virtual_pipeline or 1)
        for parameter in chunk_parameters(model, layout, stage, chunk, sharded_attention)
        if parameter.name.startswith("layers.")
        and parameter.name.endswith(".weight")
        and not any(part in parameter.name for part in ("norm", "router", "depth_gate"))
    )


@dataclass(frozen=True)
class Buffer:
    """One contiguous buffer of parameters, and one of their gradients, `size` elements each with padding.

    `spans` are the parameters' ranges in it; `buckets` the ranges that are each split evenly over `ranks`
    replicas.
    """

    size: int
    ranks: int
    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    def owned(self, replica: int) -> int:
        """Elements of parameters whose optimizer state one replica keeps."""
        total = 0
        for begin, end in self.buckets:
            share = (end - begin) // self.ranks
            low, high = begin + replica * share, begin + (replica + 1) * share
            total += sum(max(0, min(high, stop) - max(low, start)) for start, stop in self.spans)
        return total


def lay_out(parameters: list[Parameter], ranks: int, bucket_size: int | None = None) -> Buffer:
    """The buffer of one kind of parameters of one chunk, as megatron-core lays it out: the last parameter
    first."""
    position = begin = 0
    spans, buckets, waiting = [], [], False

    def close(end: int) -> int:
        divisor = math.lcm(ranks, 128)
        padded = -(-end // divisor) * divisor
        buckets.append((begin, padded))
        return padded

    for parameter in reversed(parameters):
        position = -(-position // 64) * 64
        if parameter.own_bucket and waiting:
            position = begin = close(position)
        spans.append((position, position + parameter.size))
        position += parameter.size
        waiting = True
        if parameter.own_bucket or (bucket_size is not None and position - begin >= bucket_size):
            position = begin = close(position)
            waiting = False
    if waiting:
        begin = close(position)
    return Buffer(begin, ranks, tuple(spans), tuple(buckets))


@lru_cache(maxsize=16)
def buffers(
    model: ModelConfig, layout: Layout, stage: int, sharded_attention: bool = True, overlap: bool = False
) -> tuple[tuple[Buffer, bool], ...]:
    """(buffer, whether it holds experts) of every chunk on a stage.

    With `overlap`, as on GPUs, the first chunk of the first stage is cut into buckets. Remembered, as
    `product_elements` is: neither micro-batches nor recomputation change it.
    """
    result = []
    for chunk in range(layout.virtual_pipeline or 1):
        parameters = chunk_parameters(model, layout, stage, chunk, sharded_attention)
        size = BUCKET_SIZE if overlap and stage == 0 and chunk == 0 else None
        for expert in (False, True):
            kind = [parameter for parameter in parameters if parameter.expert == expert]
            if kind:
                ranks = layout.expert_data if expert else layout.data
                result.append((lay_out(kind, ranks, size), expert))
    return tuple(result)
