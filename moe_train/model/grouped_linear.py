"""One linear layer for each expert, applied to rows sorted by expert: the matrix products of MoE and of MoA alike.

Three ways to compute the same thing. :func:`grouped_linear_reference` is the definition, a plain loop that autograd
differentiates. On a CPU the loop writes into one output and accumulates weight gradients in place. On a GPU torch's
grouped matrix product does all experts in one kernel, in bf16 and for sizes it can take; the loop does the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moe_train.model.gradients import add_product, added_to_main_grad, has_main_grad
from moe_train.model.parameters import expert_parallel, new_parameter, sequence_parallel
from parallel.dispatch.rows import ExpertRows
from parallel.topology import Topology


class GroupedLinear(torch.nn.Module):
    """``y[rows of e] = x[rows of e] @ weight[e].T`` for the experts of this rank.

    Args:
        name: global name of the layer; its weight is ``name.weight``, globally ``[num_experts, out, in]``.
        sharded: whether the experts are split over the expert-parallel ranks, or whole on every rank.
    """

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
        ranks = topology.layout.expert if sharded else 1
        local = num_experts // ranks
        first = topology.expert_rank * local if sharded else 0
        weight = new_parameter(
            f"{name}.weight",
            (num_experts, out_features, in_features),
            offset=(first, 0, 0),
            shape=(local, out_features, in_features),
            replica=0 if sharded else topology.tensor_rank,
            dtype=engine.params_dtype,
            device=topology.device,
        )
        self.num_experts = num_experts
        # Whole experts on every rank are dense parameters that each tensor rank applies to its part of the sequence.
        self.weight = expert_parallel(weight) if sharded else sequence_parallel(weight)

    @property
    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The weight of each expert of this rank, ``[out, in]``."""
        return self.weight.unbind()

    def forward(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """``[rows, in]`` sorted by expert to ``[rows, out]``."""
        if x.is_cuda and suits_grouped_mm(x, self.weight):
            return grouped_mm(x, self.weight, rows)
        return _GroupedLinear.apply(x, self.weight, rows.counts)


def grouped_linear_reference(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The definition: ``[rows, in]``, ``[E, out, in]`` and the rows of each expert to ``[rows, out]``."""
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(counts), weight.unbind())])


def suits_grouped_mm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these: it is bf16 on a GPU, wants rows of whole 16 bytes, and some rows at
    all."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and x.dtype == torch.bfloat16 and aligned and len(x) > 0


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
    """torch's grouped matrix product, which asks the host nothing. There are no rows beyond those of the experts, which
    it would leave uninitialised."""
    return _GroupedMM.apply(x, weight, rows)


class _GroupedMM(torch.autograd.Function):
    """The grouped product gives weight gradients in the precision of its operands. Where the host knows the counts (it
    does with expert parallelism) each expert's product is added to the fp32 ``main_grad`` by itself: 8 bytes of memory
    traffic a weight for 12, and nothing is rounded."""

    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return F.grouped_mm(x, weight.transpose(1, 2), offs=rows.offsets)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = F.grouped_mm(grad, weight, offs=ctx.rows.offsets) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        if has_main_grad(weight) and ctx.rows.known_to_host:
            _add_weight_gradients(weight, grad, x, ctx.rows.counts)
            return grad_x, None, None
        grad_weight = F.grouped_mm(grad.t(), x, offs=ctx.rows.offsets)
        if has_main_grad(weight):
            weight.main_grad.add_(grad_weight)
            added_to_main_grad(weight)
            return grad_x, None, None
        return grad_x, grad_weight, None


def _add_weight_gradients(weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, counts: list[int]) -> None:
    for into, rows, inputs in zip(weight.main_grad.unbind(), grad.split(counts), x.split(counts)):
        if len(rows):
            add_product(into, rows.t(), inputs)
    added_to_main_grad(weight)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, counts):
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(len(x), weight.shape[1])
        for rows, result, w in zip(x.split(counts), out.split(counts), weight.unbind()):
            torch.mm(rows, w.t(), out=result)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for rows, result, w in zip(grad.split(ctx.counts), grad_x.split(ctx.counts), weight.unbind()):
                torch.mm(rows, w, out=result)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        if has_main_grad(weight):
            _add_weight_gradients(weight, grad, x, ctx.counts)
            return grad_x, None, None
        grad_weight = torch.empty_like(weight)
        for into, rows, inputs in zip(grad_weight.unbind(), grad.split(ctx.counts), x.split(ctx.counts)):
            torch.mm(rows.t(), inputs, out=into)  # an expert without rows gets zeros
        return grad_x, grad_weight, None
