"""The parts of a layer of which there are two: from torch and megatron-core alone, and from Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel

from moe_train.model.attention_core import causal_attention
from moe_train.model.grouped_linear import GroupedLinear
from moe_train.model.linear import column_parallel, row_parallel
from moe_train.model.norm import RMSNorm
from moe_train.model.options import ModelOptions
from parallel.placement import Placement


class Scales(NamedTuple):
    """What delayed FP8 scaling remembers of some products' operands: ``kind`` says what, ``placement`` of which
    products of the weight it is named after, with replica 0 where it is to be written; ``tensor`` is a view of it."""

    kind: str
    placement: Placement
    tensor: torch.Tensor


@dataclass(frozen=True)
class Kernels:
    """What makes each part. Both sets take the same arguments and place the same parameters, so that a checkpoint of
    one loads into the other.

    ``norm(name, size, eps, topology, dtype)``; ``column_parallel`` and ``row_parallel(name, global_shape, ..., engine,
    topology)`` as in :mod:`moe_train.model.linear`; ``grouped_linear(name, num_experts, in, out, engine, topology,
    sharded)``; ``attention(engine, topology)`` makes a causal attention over ``[S, B, n, g, d]`` queries;
    ``recompute(engine, function, x)`` is ``function(x)`` of which nothing but x is kept for the backward;
    ``scales(model)`` is what FP8 remembers.
    """

    norm: Callable[..., torch.nn.Module]
    column_parallel: Callable[..., torch.nn.Module]
    row_parallel: Callable[..., torch.nn.Module]
    grouped_linear: Callable[..., torch.nn.Module]
    attention: Callable[..., Callable[..., torch.Tensor]]
    recompute: Callable[[Any, Callable, torch.Tensor], torch.Tensor]
    scales: Callable[[torch.nn.Module], list[Scales]]


def _recompute(engine, function: Callable, x: torch.Tensor) -> torch.Tensor:
    return tensor_parallel.checkpoint(function, False, x)


TORCH = Kernels(
    norm=RMSNorm,
    column_parallel=column_parallel,
    row_parallel=row_parallel,
    grouped_linear=GroupedLinear,
    attention=lambda engine, topology: causal_attention,
    recompute=_recompute,
    scales=lambda model: [],
)


def kernels_of(options: ModelOptions) -> Kernels:
    """The set that ``options`` name."""
    if options.kernels == "torch":
        return TORCH
    from moe_train.model.transformer_engine import TRANSFORMER_ENGINE

    return TRANSFORMER_ENGINE
