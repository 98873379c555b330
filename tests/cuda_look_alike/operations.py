"""Operations on tensors of the GPU and of the host."""

from __future__ import annotations

import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_look_alike import host_waits
from tests.cuda_look_alike.collectives import check_collective
from tests.cuda_look_alike.host_waits import INDEXED
from tests.cuda_look_alike.sides import on_gpu, place, storage_of, tensors


class _Local(threading.local):
    called = False
    """Whether a factory is called by name: others, of gradients that are zero, are autograd's own."""


local = _Local()


class Apart(TorchDispatchMode):
    """The result of each operation lies where its operands do, and these on one side."""

    MOVES = ("copy_", "_to_copy", "_foreach_copy_", "_foreach_copy", "lift_fresh", "set_", "_local_scalar_dense")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(each.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for each in types):
            return NotImplemented  # it is done with the tensors that theirs are made of
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            check_collective(name, args)
            return func(*args, **kwargs)
        free = name in INDEXED and on_gpu(args[0])  # to have indices on the host
        operands = list(tensors(args[:1] + args[2:] if free else (args, kwargs)))
        held = {storage_of(each)._cdata for each in tensors((args, kwargs))}
        # A scalar of the host may meet the GPU's tensors, not the other way round.
        sides = {on_gpu(each) for each in operands if each.dim() or on_gpu(each)}
        if len(sides) > 1 and name not in self.MOVES:
            found = ", ".join(f"{tuple(each.shape)} on the {'GPU' if on_gpu(each) else 'host'}" for each in operands)
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {found}")
        if host_waits.found is not None:
            host_waits.note_operation(name, args, kwargs, operands, len(sides) > 1)
        gpu = True in sides or not operands and not local.called and torch._C._current_graph_task_id() != -1
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        result = _in_fp32(func, args, kwargs) if "out_dtype" in kwargs else func(*args, **kwargs)
        for tensor in tensors(result):
            if storage_of(tensor)._cdata not in held:
                place(tensor, gpu)
        return result


def _in_fp32(func, args, kwargs):
    """A product of bf16 matrices with a result in fp32, which CPUs do not have."""
    out_dtype = kwargs.pop("out_dtype")
    return func(*(each.to(out_dtype) if isinstance(each, torch.Tensor) else each for each in args), **kwargs)
