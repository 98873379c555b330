"""RMS normalisation, in the order of JetMoE: computed in fp32, cast back, then scaled by the weight."""
from __future__ import annotations

import torch

from moe_train.model.parameters import new_parameter, sequence_parallel
from parallel.topology import Topology


class RMSNorm(torch.nn.Module):
    """``w * cast(x32 * rsqrt(mean(x32^2) + eps))`` over the last dimension, ``[..., H] -> [..., H]``.

    Under tensor parallelism each rank normalises its part of the sequence. With ``split`` it has the whole sequence
    and a part of the ``size`` channels instead, ``[..., size / TP]``; the mean is taken over those of all tensor ranks.
    """

    def __init__(self, name: str, size: int, eps: float, topology: Topology, dtype: torch.dtype, split: bool = False):
        super().__init__()
        self.eps, self.size = eps, size
        self.reduce = topology.sum_over_tensor_ranks if split and topology.layout.tensor > 1 else None
        if split:
            local = size // topology.layout.tensor
            where = {"offset": (topology.tensor_rank * local,), "shape": (local,)}
        else:
            where = {"replica": topology.tensor_rank}
        self.weight = new_parameter(f"{name}.weight", (size,), **where, dtype=dtype, device=topology.device)
        if split:
            self.weight.tensor_model_parallel = True
        else:
            sequence_parallel(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, self.size, self.reduce)


class _RMSNorm(torch.autograd.Function):
    """``reduce`` sums over the ranks that hold the other channels, in place, outside of autograd; None: nobody does."""

    @staticmethod
    def forward(ctx, x, weight, eps, size, reduce):
        x32 = x.float()
        squares = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_()
        if reduce is not None:
            reduce(squares)
        scale = squares.div_(size).add_(eps).rsqrt_()
        normed = (x32 * scale).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.size, ctx.reduce = size, reduce
        return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad32 = grad.float()
        grad_weight = (grad32 * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad32 = grad32 * weight
        mean = torch.linalg.vecdot(grad32, normed).unsqueeze_(-1)
        if ctx.reduce is not None:
            ctx.reduce(mean)
        grad_x = grad32.addcmul_(normed, mean.div_(ctx.size), value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None, None, None
