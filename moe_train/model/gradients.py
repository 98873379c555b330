"""Weight gradients added straight to the buffer that data parallelism reduces.

megatron-core's DDP gives each parameter a ``main_grad``, a view of that buffer, and adds ``param.grad`` to it after the
backward of each micro-batch. A matrix product that accumulates in place saves that pass over memory. It then returns no
gradient and calls :func:`added_to_main_grad`: DDP, which takes a ``param.grad`` for the sign that the gradient is there
and where it overlaps its reduction with the backward insists on one, finds a marker without memory of its own and
leaves it alone.
"""

from __future__ import annotations

import functools

import torch


def has_main_grad(parameter: torch.Tensor) -> bool:
    """Whether a backward may add to ``parameter.main_grad`` instead of returning a gradient."""
    return getattr(parameter, "accumulate_in_place", False)


def added_to_main_grad(parameter: torch.Tensor) -> None:
    """Tell DDP that a backward, which returns None for this parameter, has added its gradient to ``main_grad``."""
    marker = getattr(parameter, "gradient_marker", None)
    if marker is not None:
        parameter.grad, parameter.grad_added_to_main_grad = marker, True


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``, in fp32 whatever the operands."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and _adds_to_fp32():
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


@functools.cache
def _adds_to_fp32() -> bool:
    """Whether this torch's product of bf16 matrices on a GPU can be added to an fp32 one: not all that know
    ``out_dtype`` can."""
    ones, total = (torch.ones(16, 16, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == 17.0).all())


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Let the backwards of ``model``'s layers use the shortcut: call it once DDP has set ``main_grad``."""
    tied = model.share_embeddings_and_output_weights and model.pre_process and model.post_process
    for parameter in model.parameters():
        if hasattr(parameter, "main_grad"):
            parameter.accumulate_in_place = True
            # The embedding's own part comes as a gradient, after that of the head to which it is tied.
            if not (tied and parameter is model.embedding.weight):
                parameter.gradient_marker = parameter.detach().new_empty(()).expand(parameter.shape)
