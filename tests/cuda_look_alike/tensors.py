"""How tensors are made on the GPU, get there and away, and what they say of where they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import DeviceContext, _device_constructors

from tests.cuda_look_alike.host_waits import note
from tests.cuda_look_alike.operations import local
from tests.cuda_look_alike.sides import GPU, HOST, WRAPS, device_of, listed, on_gpu, pinned, place, put


def _is_gpu(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


FACTORIES = (
    "empty empty_strided zeros ones full arange linspace eye rand randn randint randperm tensor as_tensor "
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like tril_indices triu_indices"
).split()
NEW = "new_empty new_zeros new_ones new_full new_tensor new_empty_strided".split()


def _factory(make: Callable) -> Callable:
    """``make`` with a ``device`` that may be the GPU."""

    @functools.wraps(make)
    def made(*args, **kwargs):
        device = kwargs.get("device")
        pin = kwargs.pop("pin_memory", False)
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and getattr(generator, "of_gpu", False) != _is_gpu(device):
            raise RuntimeError("the generator is of another device")
        if device is not None and (_is_gpu(device) or torch.device(device).type == "cpu"):
            kwargs["device"] = HOST
            # What comes from a tensor's memory may be that tensor itself.
            own = make.__name__ == "as_tensor" and isinstance(args[0], torch.Tensor)
            if make.__name__ in ("tensor", "as_tensor", "new_tensor") and _is_gpu(device) and not own:
                note(make.__name__)
            result = _called(make, *args, **kwargs)
            result = _tensor_to(result, device) if own else place(result, _is_gpu(device))
        else:
            result = _called(make, *args, **kwargs)
        if pin:
            put(pinned, result)
        return result

    return made


def _called(make: Callable, *args, **kwargs) -> Any:
    local.called = True
    try:
        return make(*args, **kwargs)
    finally:
        local.called = False


_in_context = DeviceContext.__torch_function__


def _in_device_context(self, func, types, args=(), kwargs=None) -> Any:
    """What is made in ``with torch.device("cuda")``."""
    if self.device.type != "cuda":
        return _in_context(self, func, types, args, kwargs)
    made = func(*args, **(kwargs or {}))
    return place(made, True) if func in _device_constructors() and not (kwargs or {}).get("device") else made


_to = torch.Tensor.to


def _tensor_to(self: torch.Tensor, *args, copy: bool = False, **kwargs) -> torch.Tensor:
    """``Tensor.to`` in each of its forms."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or self.device, dtype or self.dtype
    if {device_of(self).type, device.type} - {"cpu", "cuda"}:  # meta
        return _to(self, device, dtype, copy=copy, memory_format=memory_format)
    if device.type != self.device.type:
        copy = True
        if not non_blocking:
            note("to")
    result = _to(self, HOST, dtype, copy=copy, memory_format=memory_format or torch.preserve_format)
    return place(result, device.type == "cuda") if result is not self else self


_wrapper = torch.Tensor._make_wrapper_subclass


def _make_wrapper(cls, *args, device=None, **kwargs) -> torch.Tensor:
    gpu = _is_gpu(device)
    made = _wrapper(cls, *args, device=HOST if gpu else device, **kwargs)
    if gpu:
        setattr(made, WRAPS, True)
    return made


def _refused_on_the_gpu(convert: Callable) -> Callable:
    @functools.wraps(convert)
    def converted(self: torch.Tensor, *args, **kwargs):
        if on_gpu(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        return convert(self, *args, **kwargs)

    return converted


def _to_list(self: torch.Tensor) -> list:
    if on_gpu(self):
        note("tolist")
    return _list_of(self)


_list_of = torch.Tensor.tolist


def _pin(self: torch.Tensor, device=None) -> torch.Tensor:
    if on_gpu(self):
        raise RuntimeError("cannot pin a tensor of the GPU: only dense CPU tensors can be pinned")
    copy = self.clone()
    put(pinned, copy)
    return copy


def _tensor_type(self: torch.Tensor, dtype=None, *args, **kwargs):
    answer = _type(self, dtype, *args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if dtype is None and on_gpu(self) else answer


_type = torch.Tensor.type


def _device(self: torch.Tensor) -> torch.device:
    return GPU if on_gpu(self) else device_of(self)


def install() -> None:
    """Replace torch's factories and the methods of its tensors."""
    _device_constructors()  # which keeps the factories as they are for `with torch.device(...)`
    DeviceContext.__torch_function__ = _in_device_context
    for name in FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in NEW:
        setattr(torch.Tensor, name, _factory(getattr(torch.Tensor, name)))
    patched = dict(
        to=_tensor_to, numpy=_refused_on_the_gpu(torch.Tensor.numpy),
        __array__=_refused_on_the_gpu(torch.Tensor.__array__), pin_memory=_pin, type=_tensor_type,
        cpu=lambda self, *args, **kwargs: _tensor_to(self, HOST),
        cuda=lambda self, device=None, non_blocking=False, **kwargs: _tensor_to(self, GPU, non_blocking=non_blocking),
        tolist=_to_list,
        is_pinned=lambda self, device=None: listed(pinned, self),
        record_stream=lambda self, stream: None,
        _make_wrapper_subclass=staticmethod(_make_wrapper),
        get_device=lambda self: 0 if on_gpu(self) else -1,
        device=property(_device), is_cuda=property(on_gpu), is_cpu=property(lambda self: _device(self).type == "cpu"),
    )  # fmt: skip
    for name, value in patched.items():
        setattr(torch.Tensor, name, value)
