"""RMS normalisation, in the order of JetMoE: computed in fp32, cast back, then scaled by the weight."""
from __future__ import annotations

import torch

from moe_train.model.parameters import new_parameter, sequence_parallel
from parallel.topology import Topology

LAYER_NORM_EPS = 1e-6  # of the norms inside the layers, whatever the config says: JetMoE builds them without one


class RMSNorm(torch.nn.Module):
    """``w * cast(x32 * rsqrt(mean(x32^2) + eps))`` over the last dimension, ``[..., H] -> [..., H]``.

    Under sequence parallelism each tensor rank normalises its part of the sequence.
    """

    def __init__(self, name: str, size: int, eps: float, topology: Topology, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = sequence_parallel(
            new_parameter(f"{name}.weight", (size,), replica=topology.tensor_rank, dtype=dtype, device=topology.device)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (x32 * scale).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad32 = grad.float()
        grad_weight = (grad32 * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad32 = grad32 * weight
        mean = torch.linalg.vecdot(grad32, normed).unsqueeze_(-1).div_(x.shape[-1])
        grad_x = grad32.addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None
