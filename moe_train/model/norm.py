"""RMS normalisation, in the order of JetMoE: computed in fp32, cast back, then scaled by the weight."""

from __future__ import annotations

import torch

from moe_train.model.parameters import new_parameter, sequence_parallel
from parallel.fuse import fused
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
        if reduce is None:
            out, scale = _normalize(x, weight, eps)
        else:
            scale = reduce(_sum_of_squares(x)).div_(size).add_(eps).rsqrt_()
            out = _apply_scale(x, weight, scale)
        ctx.save_for_backward(x, weight, scale)
        ctx.size, ctx.reduce = size, reduce
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        if ctx.reduce is None:
            grad_x, grad_weight = _normalize_backward(grad, x, weight, scale)
        else:
            mean, grad_weight = _sums_of_backward(grad, x, weight, scale)
            grad_x = _rest_of_backward(grad, x, weight, scale, ctx.reduce(mean).div_(ctx.size))
        return grad_x, grad_weight, None, None, None


@fused
def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square_()


@fused
def _apply_scale(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    normed = (x.float() * scale).to(x.dtype)
    return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight


@fused
def _normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised ``x``, and what each of its vectors was scaled by."""
    scale = _sum_of_squares.plain(x).div_(x.shape[-1]).add_(eps).rsqrt_()
    return _apply_scale.plain(x, weight, scale), scale


@fused
def _sums_of_backward(grad, x, weight, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of gradient and output, summed over the channels, and the gradient of ``weight``."""
    normed = x.float() * scale
    grad32 = grad.float()
    grad_weight = (grad32 * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return torch.linalg.vecdot(grad32 * weight, normed).unsqueeze(-1), grad_weight


@fused
def _rest_of_backward(grad, x, weight, scale, mean) -> torch.Tensor:
    normed = x.float() * scale
    return (grad.float() * weight).addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype)


@fused
def _normalize_backward(grad, x, weight, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``x`` and ``weight``."""
    normed = x.float() * scale
    grad32 = grad.float()
    grad_weight = (grad32 * normed).flatten(0, -2).sum(0).to(weight.dtype)
    grad32 = grad32 * weight
    mean = torch.linalg.vecdot(grad32, normed).unsqueeze_(-1).div_(x.shape[-1])
    return grad32.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_weight
