"""Chains of elementwise operations as one kernel on a GPU, by torch.compile.

Each step of such a chain reads and writes its whole tensor, and on a GPU the memory is what it waits for. :func:`fused`
marks a pure function of tensors, called inside of an autograd function (it is not differentiated itself). On a CPU, and
with ``torch.use_deterministic_algorithms`` (what the compiler picks by timing may differ from start to start), it runs
as it is written. ``TORCH_COMPILE_DISABLE=1``, torch's own switch, has it run so on GPUs too.

It is compiled when it is first called on a GPU; until then nothing of the compiler is imported. The last dimension is a
width, and each is compiled for. Others that change from call to call become dynamic at their first change, and with
``rows`` the first one is so from the start: with dropless routing the number of rows is another in each step, and none
is compiled for again.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def fused(function: Callable | None = None, *, rows: bool = False, eager: Callable | None = None) -> Callable:
    """Decorate a pure function of tensors: compiled on GPUs.

    Args:
        rows: the first dimension of all its tensors is a number of rows, another at each call.
        eager: the same function where it is not compiled, in place where that is faster; ``function`` is its
            definition.

    The result has two attributes for tests: ``plain``, the definition, and ``compiled``, on any device.
    """
    if function is None:
        return functools.partial(fused, rows=rows, eager=eager)
    uncompiled = eager or function

    @functools.cache
    def compiler() -> Callable:
        return torch.compile(function)

    def compiled(*args: Any) -> Any:
        # Neither what is differentiated nor what is a parameter makes another kernel.
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if rows:
                    torch._dynamo.maybe_mark_dynamic(arg, 0)
                if arg.dim() > 1:
                    torch._dynamo.mark_static(arg, arg.dim() - 1)
        with torch.no_grad():
            return compiler()(*args)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (compiled if compiles(args[0]) else uncompiled)(*args)

    call.plain, call.compiled = function, compiled
    return call


def compiles(tensor: torch.Tensor) -> bool:
    """Whether what is marked is compiled for this first argument."""
    # A size of 0 or 1 is never dynamic: it would be compiled for itself.
    return tensor.is_cuda and len(tensor) > 1 and not torch.are_deterministic_algorithms_enabled() and has_compiler()


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile can make kernels for this GPU: it takes Triton, which comes with torch's builds for CUDA,
    and what Triton builds its own part with, a C compiler and Python's headers. Says once what is missing: without it
    all is slower."""
    from torch.utils._triton import has_triton

    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's: Triton looks there
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    missing = None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing = "a C compiler (gcc, clang, or one that CC names)"
    elif not headers.exists():
        missing = f"Python's headers ({headers})"
    elif not has_triton():
        # by its name the engine's filter of warnings would take this for megatron-core's
        missing = "its backend for this GPU"
    if missing:
        warnings.warn(
            f"torch.compile lacks {missing}: elementwise chains run uncompiled, which is slower", stacklevel=2
        )
    return missing is None
