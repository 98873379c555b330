"""Layers of Transformer Engine, through megatron-core's wrappers, with our parameters' names and placement.

Inside of an FP8 context (:func:`parallel.transformer_engine.precision_context`) the linear layers, grouped ones
included, multiply in FP8; the attention itself stays in the model's precision, and so do routers and head, which are
not from here. Weight gradients go straight into the fp32 buffer that data parallelism reduces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import transformer_engine.pytorch as te
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TEGroupedLinear,
    TERowParallelLinear,
    te_checkpoint,
)
from megatron.core.transformer.enums import AttnMaskType

from moe_train.model.kernels import Kernels, Scales
from moe_train.model.linear import column_parallel, row_parallel
from moe_train.model.norm import RMSNorm
from moe_train.model.parameters import expert_parallel, sequence_parallel
from parallel.dispatch.rows import ExpertRows
from parallel.placement import Placement, place
from parallel.topology import Topology
from parallel.transformer_engine import precision_context


def norm(
    name: str, size: int, eps: float, topology: Topology, dtype: torch.dtype, split: bool = False
) -> torch.nn.Module:
    """RMS norm over the last dimension, scaled before it is cast. Over channels that are ``split`` it is ours."""
    if split:
        return RMSNorm(name, size, eps, topology, dtype, split)
    layer = te.RMSNorm(size, eps=eps, params_dtype=dtype, device=topology.device)
    place(layer.weight, Placement(f"{name}.weight", (size,), (0,), (size,), (size,), topology.tensor_rank))
    sequence_parallel(layer.weight)
    return layer


class GroupedLinear(torch.nn.Module):
    """As :class:`moe_train.model.grouped_linear.GroupedLinear`; the weight of each expert is a parameter of its own."""

    def __init__(
        self,
        name: str,
        num_experts: int,
        in_features: int,
        out_features: int,
        engine,
        topology: Topology,
        sharded: bool = True,
    ):
        super().__init__()
        local = num_experts // (topology.layout.expert if sharded else 1)
        first = topology.expert_rank * local if sharded else 0
        self.num_experts = num_experts
        self.experts = TEGroupedLinear(
            local,
            in_features,
            out_features,
            parallel_mode=None,
            config=engine,
            init_method=None,
            bias=False,
            skip_bias_add=False,
            is_expert=True,
            pg_collection=topology.groups,
        )
        whole, one = (num_experts, out_features, in_features), (1, out_features, in_features)
        replica = 0 if sharded else topology.tensor_rank
        for index, weight in enumerate(self.matrices):
            place(weight, Placement(f"{name}.weight", whole, (first + index, 0, 0), one, one, replica))
            weight.allreduce = True  # megatron-core's wrapper goes by the layout; what we mean is said next
            expert_parallel(weight) if sharded else sequence_parallel(weight)

    @property
    def matrices(self) -> list[torch.nn.Parameter]:
        """The weight of each expert of this rank, ``[out, in]``."""
        return [getattr(self.experts, f"weight{index}") for index in range(self.experts.num_gemms)]

    def forward(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """``[rows, in]`` sorted by expert to ``[rows, out]``. The host waits for the counts."""
        return self.experts(x, rows.counts)[0]


class CausalAttention(torch.nn.Module):
    """The best attention that Transformer Engine finds (cuDNN's, or flash-attn's where that is installed)."""

    def __init__(self, engine, topology: Topology):
        super().__init__()
        self.core = TEDotProductAttention(
            engine,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=topology.groups,
        )

    def forward(self, q_sbngd: torch.Tensor, k_sbnd: torch.Tensor, v_sbnd: torch.Tensor) -> torch.Tensor:
        """As :func:`moe_train.model.attention_core.causal_attention`."""
        o_sbh = self.core(q_sbngd.flatten(2, 3), k_sbnd, v_sbnd, None, AttnMaskType.causal)
        return o_sbh.view(q_sbngd.shape)


def delayed_scales(model: torch.nn.Module) -> list[Scales]:
    """What delayed scaling remembers for each tensor of the products of ``model`` (a chunk); nothing in another recipe.

    Brings it about where no step was taken yet, so that a checkpoint can be read into it.
    """
    engine, topology = model.config, model.topology
    if not (engine.fp8 and engine.fp8_recipe == "delayed"):
        return []
    dense = topology.tensor_rank + topology.layout.tensor * topology.data_rank  # 0 on one of those that hold the same
    found: list[Scales] = []
    with precision_context(engine):
        for layer in model.modules():
            if isinstance(layer, TEColumnParallelLinear | TERowParallelLinear):
                layer.init_fp8_metadata()
                found += _scales(layer, layer.weight.placement.name, 1, 0, 1, dense)
            elif isinstance(layer, GroupedLinear):
                first, local = layer.matrices[0], len(layer.matrices)
                layer.experts.init_fp8_metadata(num_gemms=local)
                replica = dense if first.allreduce else topology.expert_data_rank
                whole, offset = layer.num_experts, first.placement.offset[0]
                found += _scales(layer.experts, first.placement.name, whole, offset, local, replica)
    return found


def _scales(layer, name: str, products: int, first: int, local: int, replica: int) -> Iterator[Scales]:
    """Of ``products`` in the whole model, of which ``layer`` does ``local`` from ``first`` on: three tensors each in
    the forward (input, weight, output), two in the backward."""
    for direction, key, count in (("forward", "scaling_fwd", 3), ("backward", "scaling_bwd", 2)):
        state = layer.fp8_meta[key]
        length = len(state.amax_history)
        shape = (local, count)
        yield Scales(
            f"fp8_{direction}_scale",
            Placement(name, (products, count), (first, 0), shape, shape, replica),
            state.scale.view(shape),
        )
        shape = (length, local, count)
        yield Scales(
            f"fp8_{direction}_amax",
            Placement(name, (length, products, count), (0, first, 0), shape, shape, replica),
            state.amax_history.view(shape),
        )


def recompute(engine, function: Callable, x: torch.Tensor) -> torch.Tensor:
    """Transformer Engine's recomputation in FP8, where both passes must use the same scales."""
    if not engine.fp8:
        return tensor_parallel.checkpoint(function, False, x)
    return te_checkpoint(function, False, tensor_parallel.random.get_cuda_rng_tracker, None, x)


TRANSFORMER_ENGINE = Kernels(
    norm=norm,
    column_parallel=partial(column_parallel, make=TEColumnParallelLinear),
    row_parallel=partial(row_parallel, make=TERowParallelLinear),
    grouped_linear=GroupedLinear,
    attention=CausalAttention,
    recompute=recompute,
    scales=delayed_scales,
)
