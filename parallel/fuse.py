"""Chains of elementwise operations as one kernel on a GPU, by torch.compile.

Each step of such a chain reads and writes its whole tensor, and on a GPU the memory is what it waits for. :func:`fused`
marks a pure function of tensors, called inside of an autograd function (it is not differentiated itself). On a CPU, and
with ``torch.use_deterministic_algorithms`` (what the compiler picks by timing may differ from start to start), it runs as
it is written. ``TORCH_COMPILE_DISABLE=1``, torch's own switch, has it run so on GPUs too.

It is compiled when it is first called on a GPU; until then nothing of the compiler is imported. Dimensions that change
from call to call become dynamic at their first change, and with ``rows`` the first dimension is so from the start: with
dropless routing the number of rows is another in each step, and none is compiled for again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def fused(function: Callable | None = None, *, rows: bool = False, on_cpu: Callable | None = None) -> Callable:
    """Decorate a pure function of tensors: compiled on GPUs.

    Args:
        rows: the first dimension of its tensors is a number of rows that is another at each call (those with fewer
            than two dimensions and those with one row, such as weights, excepted).
        on_cpu: the same function for CPUs, in place where that is faster; ``function`` is then its definition.

    The result has two attributes for tests: ``plain``, the definition, and ``compiled``, on any device.
    """
    if function is None:
        return functools.partial(fused, rows=rows, on_cpu=on_cpu)
    uncompiled = on_cpu or function

    @functools.cache
    def compiler() -> Callable:
        return torch.compile(function, fullgraph=True)

    def compiled(*args: Any) -> Any:
        # Neither what is differentiated nor what is a parameter makes another kernel.
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        if rows:
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.dim() > 1 and len(arg) > 1:
                    torch._dynamo.maybe_mark_dynamic(arg, 0)
        with torch.no_grad():
            return compiler()(*args)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        first = args[0]
        if not first.is_cuda:
            return uncompiled(*args)
        # A size of 0 or 1 is never dynamic: it would be compiled for itself.
        if len(first) < 2 or torch.are_deterministic_algorithms_enabled() or not has_compiler():
            return function(*args)
        return compiled(*args)

    call.plain, call.compiled = function, compiled
    return call


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile can make kernels for this GPU: it takes Triton, which comes with torch's builds for CUDA."""
    from torch.utils._triton import has_triton

    return has_triton()
