"""Weight gradients added straight to the buffer that data parallelism reduces.

megatron-core's DDP gives each parameter a ``main_grad``, a view of that buffer, and adds ``param.grad`` to it after the backward
of each micro-batch. A matrix product that accumulates in place saves that pass over memory. Where DDP overlaps its
reduction with the backward it waits for ``param.grad``, so the shortcut is off there.
"""
from __future__ import annotations

import torch


def has_main_grad(parameter: torch.Tensor) -> bool:
    """Whether a backward may add to ``parameter.main_grad`` instead of returning a gradient."""
    return getattr(parameter, "accumulate_in_place", False)


def add_to_main_grad(main_grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``main_grad += left @ right``, in fp32 whatever the operands."""
    if left.dtype == main_grad.dtype:
        main_grad.addmm_(left, right)
    else:
        main_grad.add_(left @ right)


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Let the backwards of ``model``'s layers use the shortcut: call it once DDP has set ``main_grad``, without overlap."""
    for parameter in model.parameters():
        if hasattr(parameter, "main_grad"):
            parameter.accumulate_in_place = True
