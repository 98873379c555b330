"""Run megatron-core on CPUs: stand-ins for what it asks of CUDA.

megatron-core takes a CUDA device for granted. On a build of torch without one, this module puts a stand-in behind each
of those calls, and nothing else: process groups, schedules, data parallelism, optimizer and expert dispatch stay
megatron-core's own. Every stand-in names one of its callers and the words that the caller's source must contain;
a test walks the list and fails when the pinned megatron-core no longer says them, so that a stand-in cannot
outlive its reason. Installed once a process by :func:`parallel.engine.start`, only where CUDA is missing.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StandIn:
    """One replaced name.

    ``target`` is the dotted path that is replaced, ``caller`` the megatron-core module that needs it and ``words`` what
    the source of that module says where it does.
    """

    target: str
    replacement: Any
    caller: str
    words: str


class _Stream:
    """A CUDA stream where work is always finished: every wait returns at once."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, _other):
        pass

    def record_event(self):
        return _Event()


class _Event:
    def __init__(self, *_, **__):
        pass

    def synchronize(self):
        pass


_STREAM = _Stream()


class _TorchOnCpu:
    """``torch`` as one megatron-core module sees it: a literal ``device="cuda"`` in a factory call means the CPU."""

    def __init__(self):
        for name in ("zeros", "ones", "empty", "tensor"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name):
        return getattr(torch, name)


def _on_cpu(factory: Callable) -> Callable:
    def make(*args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


_TORCH_ON_CPU = _TorchOnCpu()
_tensor_type = torch.Tensor.type


def _cuda_type_name(self, dtype=None, *args, **kwargs):
    """``tensor.type()`` answers with the name that the same tensor would have on a GPU."""
    answer = _tensor_type(self, dtype, *args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if dtype is None and "cuda" not in answer else answer


def _splits_as_list(tensor, as_numpy=False, record_stream=False):
    """gloo wants the split sizes of an all-to-all as plain numbers."""
    return tensor.tolist() if as_numpy and torch.is_tensor(tensor) else tensor


def _no_rng_state(device="cuda", clone=False, graph_safe=False):
    """The state of a generator that is not there. The CPU's own is kept separately by the same caller."""
    return torch.empty(0, dtype=torch.uint8)


def _unless_alone(collective: Callable) -> Callable:
    """A collective on a slice of its own buffer: nothing to do in a group of one, where gloo would copy the buffer
    twice."""

    def run(output, input, *args, group=None, **kwargs):
        if dist.get_world_size(group) > 1:
            return collective(output, input, *args, group=group, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input)
        return None

    return run


def stand_ins() -> list[StandIn]:
    """Everything that is replaced. Importing the callers is left to :func:`install`."""
    mcore = "megatron.core."
    mappings = mcore + "tensor_parallel.mappings"
    random = mcore + "tensor_parallel.random"
    dispatcher = mcore + "transformer.moe.token_dispatcher"
    ddp_buffer = mcore + "distributed.param_and_grad_buffer"
    cuda = "torch.cuda."
    literal = 'device="cuda"', "device='cuda'"
    return [
        # Output buffers of collectives and of point-to-point receives.
        StandIn(cuda + "current_device", lambda: CPU, mappings, "device=torch.cuda.current_device()"),
        # Splits of the expert all-to-all are copied to the host on a stream of their own.
        StandIn(cuda + "Stream", _Stream, dispatcher, "torch.cuda.Stream()"),
        StandIn(cuda + "current_stream", lambda device=None: _STREAM, dispatcher, "torch.cuda.current_stream()"),
        StandIn(cuda + "stream", lambda stream: nullcontext(), dispatcher, "torch.cuda.stream("),
        StandIn(cuda + "default_stream", lambda device=None: _STREAM, ddp_buffer, "torch.cuda.default_stream()"),
        StandIn(dispatcher + ".maybe_move_tensor_to_cpu", _splits_as_list, dispatcher, "maybe_move_tensor_to_cpu("),
        # Recomputation keeps and restores the state of the GPU's random generator.
        StandIn(random + "._get_cuda_rng_state", _no_rng_state, random, "_get_cuda_rng_state("),
        StandIn(random + "._set_cuda_rng_state", lambda *_, **__: None, random, "_set_cuda_rng_state("),
        # The optimizer tells fp32 from half precision by the name of a tensor's CUDA type.
        StandIn(
            "torch.Tensor.type",
            _cuda_type_name,
            mcore + "optimizer.distrib_optimizer",
            "model_param.type() == 'torch.cuda.FloatTensor'",
        ),
        # Where Transformer Engine is installed its Adam is taken, which needs a GPU.
        StandIn(mcore + "optimizer.USING_PYTORCH_OPTIMIZER", True, mcore + "optimizer", "if USING_PYTORCH_OPTIMIZER:"),
        # Gradient reduction and parameter gathering of the distributed optimizer.
        StandIn(
            ddp_buffer + ".dist_reduce_scatter_func",
            _unless_alone(dist.reduce_scatter_tensor),
            ddp_buffer,
            "dist_reduce_scatter_func(",
        ),
        StandIn(
            ddp_buffer + ".dist_all_gather_func",
            _unless_alone(dist.all_gather_into_tensor),
            ddp_buffer,
            "dist_all_gather_func(",
        ),
        # Small tensors made with a literal device.
        StandIn(
            mcore + "pipeline_parallel.schedules.torch",
            _TORCH_ON_CPU,
            mcore + "pipeline_parallel.schedules",
            literal[0],
        ),
        StandIn(mcore + "optimizer.optimizer.torch", _TORCH_ON_CPU, mcore + "optimizer.optimizer", literal[1]),
        StandIn(mcore + "optimizer.clip_grads.torch", _TORCH_ON_CPU, mcore + "optimizer.clip_grads", literal[1]),
        StandIn(mcore + "utils.torch", _TORCH_ON_CPU, mcore + "utils", literal[1]),
    ]


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones.

    By default a block of more than a few MB is mapped for each tensor and given back when it is freed, and the page
    faults of every new one cost more than many of the operations on it. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


_installed = False


def install() -> None:
    """Put every stand-in in place, once. Call it after importing megatron-core and before using it."""
    global _installed
    if _installed:
        return
    keep_freed_memory()
    for stand_in in stand_ins():
        importlib.import_module(stand_in.caller)
        owner, name = stand_in.target.rsplit(".", 1)
        setattr(_resolve(owner), name, stand_in.replacement)
    _installed = True


def _resolve(path: str) -> Any:
    """The module or class at a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, name = path.rsplit(".", 1)
        return getattr(_resolve(owner), name)
