"""Linear layers of megatron-core, split over the tensor ranks, with their parameters placed.

Input and output of such a pair of layers are this rank's part of the sequence; between the two lie the whole sequence
and a part of the channels.
"""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from parallel.placement import Placement, place
from parallel.topology import Topology


def column_parallel(
    name: str, global_shape: tuple[int, ...], split: int, engine, topology: Topology, make: type = ColumnParallelLinear
) -> torch.nn.Module:
    """``[s, B, H] -> [S, B, this rank's outputs]``; gathers the sequence.

    ``global_shape`` is that of ``name.weight``, the outputs in any number of dimensions and then H; dimension ``split``
    of the outputs is divided over the tensor ranks. ``make`` is megatron-core's class, with Transformer Engine or
    without.
    """
    *outputs, hidden = global_shape
    layer = make(
        hidden,
        math.prod(outputs),
        config=engine,
        init_method=None,
        bias=False,
        gather_output=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=topology.groups.tp,
    )
    return _placed(layer, name, global_shape, split, topology)


def row_parallel(
    name: str, global_shape: tuple[int, int], engine, topology: Topology, make: type = RowParallelLinear
) -> torch.nn.Module:
    """``[S, B, this rank's inputs] -> [s, B, H]``; sums over the tensor ranks and scatters the sequence.

    ``global_shape`` is that of ``name.weight``, ``[H, inputs]``.
    """
    hidden, inputs = global_shape
    layer = make(
        inputs,
        hidden,
        config=engine,
        init_method=None,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=topology.groups.tp,
    )
    return _placed(layer, name, global_shape, 1, topology)


def _placed(layer, name: str, global_shape: tuple[int, ...], split: int, topology: Topology):
    shape, offset = list(global_shape), [0] * len(global_shape)
    shape[split] //= topology.layout.tensor
    offset[split] = topology.tensor_rank * shape[split]
    local = tuple(shape)
    place(layer.weight, Placement(f"{name}.weight", global_shape, tuple(offset), local, local))
    layer.weight.tensor_model_parallel = True  # megatron-core says so only where it initialises
    return layer
