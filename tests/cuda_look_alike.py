"""A GPU to try programs on without one: every tensor lies in the host's memory, and those that a program puts on the
GPU are kept apart from the others.

:func:`install` changes torch for the rest of the process. ``torch.cuda`` then has one device. A tensor that was made
with ``device="cuda"``, or came out of one, says so (``.device``, ``.is_cuda``); torch computes with it on the CPU. What
would end a program on a GPU ends it here: an operation on tensors of both sides, ``.numpy()`` on the GPU's, and
NCCL with the host's tensors or with what it has no collective for. Groups over NCCL exchange over gloo.

Transformer Engine, where it is installed, computes by `tests.transformer_engine_on_cpu`.

Not seen here: streams (nothing is ever late), kernels, and what a GPU's kernels refuse that a CPU's take.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parents[1]
HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)

_there: dict[int, StorageWeakRef] = {}
"""The storages on the GPU, by their address, which is nobody else's while the reference is there."""
_pinned: dict[int, StorageWeakRef] = {}
_WRAPS = "_wraps_tensors_of_the_gpu"
"""Attribute of a tensor that is made of others."""
_device_of = torch.Tensor.device.__get__
_storage_of = torch._C.TensorBase.untyped_storage


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of the GPU's."""
    return _WRAPS in vars(tensor) or _listed(_there, tensor)


def _listed(where: dict[int, StorageWeakRef], tensor: torch.Tensor) -> bool:
    if _device_of(tensor).type != "cpu" or tensor.layout != torch.strided:
        return False
    entry = where.get(_storage_of(tensor)._cdata)
    return entry is not None and not entry.expired()


def _list(where: dict[int, StorageWeakRef], tensor: torch.Tensor) -> None:
    storage = _storage_of(tensor)
    where[storage._cdata] = StorageWeakRef(storage)
    if len(where) > 2 * _list.kept:
        for key in [key for key, entry in list(where.items()) if entry.expired()]:
            del where[key]
        _list.kept = max(1000, len(where))


_list.kept = 1000


def _place(result: Any, gpu: bool) -> Any:
    """Note where the tensors of a result lie."""
    for tensor in _tensors(result):
        if gpu:
            _list(_there, tensor)
        else:
            _there.pop(_storage_of(tensor)._cdata, None)
    return result


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_iter(values) if isinstance(each, torch.Tensor) and _device_of(each).type == "cpu")


class Apart(TorchDispatchMode):
    """The result of each operation lies where its operands do, and these on one side."""

    MOVES = ("copy_", "_to_copy", "_foreach_copy_", "_foreach_copy", "lift_fresh", "set_", "_local_scalar_dense")
    INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
    """Whose indices may lie on the host, whatever is indexed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(each.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for each in types):
            return NotImplemented  # it is done with the tensors that theirs are made of
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            _check_collective(name, args)
            return func(*args, **kwargs)
        free = name in self.INDEXED and on_gpu(args[0])  # to have indices on the host
        operands = list(_tensors(args[:1] + args[2:] if free else (args, kwargs)))
        held = {_storage_of(each)._cdata for each in _tensors((args, kwargs))}
        # A scalar of the host may meet the GPU's tensors, not the other way round.
        sides = {on_gpu(each) for each in operands if each.dim() or on_gpu(each)}
        if len(sides) > 1 and name not in self.MOVES:
            found = ", ".join(f"{tuple(each.shape)} on the {'GPU' if on_gpu(each) else 'host'}" for each in operands)
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {found}")
        if waits is not None:
            _note_wait(func, name, args, kwargs, operands, len(sides) > 1)
        gpu = True in sides or not operands and not _local.called and torch._C._current_graph_task_id() != -1
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        result = _in_fp32(func, args, kwargs) if "out_dtype" in kwargs else func(*args, **kwargs)
        for tensor in _tensors(result):
            if _storage_of(tensor)._cdata not in held:
                _place(tensor, gpu)
        return result


# ---- what waits

waits: list[str] | None = None
"""While it is a list: ``operation in file:function`` of each call that has the host wait for the GPU, by the innermost
of the project's functions."""
SIZED_BY_VALUES = (
    "equal nonzero masked_select unique _unique2 unique_consecutive repeat_interleave bincount _local_scalar_dense"
).split()


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """A list of what has the host wait for the GPU, filled while it is open."""
    global waits
    waits = []
    try:
        yield waits
    finally:
        waits = None


def _note_wait(func, name: str, args: tuple, kwargs: dict, operands: list[torch.Tensor], crosses: bool) -> None:
    if name in SIZED_BY_VALUES and any(on_gpu(each) for each in operands):
        _waits(name)
    elif name in Apart.INDEXED and on_gpu(args[0]):
        indices = [each for each in args[1] if each is not None]
        masked = any(each.dtype in (torch.bool, torch.uint8) for each in indices)
        filled = name != "index" and args[2].dim() == 0  # with a number: no row is counted
        if masked and not filled or not all(on_gpu(each) for each in indices):
            _waits(name)
    elif name == "copy_" and crosses and not (args[2:] or [kwargs.get("non_blocking")])[0]:
        if _is_ours(_callers()[-1]):  # others' are gloo's, out of a buffer of its own
            _waits(name)


def _waits(name: str) -> None:
    if waits is None:
        return
    ours = [frame for frame in _callers() if _is_ours(frame)]
    waits.append(f"{name} in {Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name}" if ours else name)


def _is_ours(frame: traceback.FrameSummary) -> bool:
    path = Path(frame.filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def _callers() -> list[traceback.FrameSummary]:
    """Who calls what is here, the innermost last."""
    return [
        frame
        for frame in traceback.extract_stack()
        if frame.filename != __file__ and not frame.filename.endswith(("_compile.py", "eval_frame.py"))
    ]


def _in_fp32(func, args, kwargs):
    """A product of bf16 matrices with a result in fp32, which CPUs do not have."""
    out_dtype = kwargs.pop("out_dtype")
    return func(*(each.to(out_dtype) if isinstance(each, torch.Tensor) else each for each in args), **kwargs)


# ---- collectives

_backends: dict[str, str] = {}
"""What a process group was asked to be, by its name."""
NCCL_HAS_NO = ("monitored_barrier_", "recv_any_source_")


def _check_collective(name: str, args: tuple) -> None:
    if name == "barrier":
        return
    (group,) = (each for each in args if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()))
    backend = _backends[dist.ProcessGroup.unbox(group).group_name]
    if backend == "nccl" and name in NCCL_HAS_NO:
        raise RuntimeError(f"NCCL has no {name}")
    for tensor in _tensors(args):
        if on_gpu(tensor) != (backend == "nccl"):
            raise RuntimeError(f"{name} over {backend}: a tensor {tuple(tensor.shape)} of {tensor.device}")
        if backend == "nccl" and not tensor.is_contiguous():
            raise RuntimeError(f"{name}: NCCL wants contiguous tensors")


def _groups() -> None:
    init, new = dist.init_process_group, dist.new_group

    @functools.wraps(init)
    def init_process_group(backend=None, *args, **kwargs):
        init("gloo" if backend == "nccl" else backend, *args, **kwargs)
        _backends[dist.group.WORLD.group_name] = backend

    @functools.wraps(new)
    def new_group(ranks=None, timeout=None, backend=None, pg_options=None, **kwargs):
        backend = backend or _backends[dist.group.WORLD.group_name]
        group = new(ranks, timeout, "gloo", None, **kwargs)
        if isinstance(group, dist.ProcessGroup):
            _backends[group.group_name] = backend
        return group

    get_backend = dist.get_backend

    def backend_of(group=None):
        name = (group or dist.group.WORLD).group_name
        return _backends.get(name) or get_backend(group)

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group, module.get_backend = init_process_group, new_group, backend_of
    device_of_group = dist.distributed_c10d._get_object_coll_device

    def object_device(group=None):
        return GPU if backend_of(group) == "nccl" else device_of_group(group)

    dist.distributed_c10d._get_object_coll_device = object_device


# ---- what says where


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
                _waits(make.__name__)
            result = (_move if own else _place)(_called(make, *args, **kwargs), _is_gpu(device))
        else:
            result = _called(make, *args, **kwargs)
        if pin:
            _list(_pinned, result)
        return result

    return made


class _Local(threading.local):
    called = False
    """Whether a factory is called by name: others, of gradients that are zero, are autograd's own."""


_local = _Local()


def _called(make: Callable, *args, **kwargs) -> Any:
    _local.called = True
    try:
        return make(*args, **kwargs)
    finally:
        _local.called = False


_in_context = DeviceContext.__torch_function__


def _in_device_context(self, func, types, args=(), kwargs=None) -> Any:
    """What is made in ``with torch.device("cuda")``."""
    if self.device.type != "cuda":
        return _in_context(self, func, types, args, kwargs)
    made = func(*args, **(kwargs or {}))
    return _place(made, True) if func in _device_constructors() and not (kwargs or {}).get("device") else made


def _move(tensor: torch.Tensor, gpu: bool, wait: bool = True) -> torch.Tensor:
    """The tensor where it shall be: itself or a copy."""
    if on_gpu(tensor) == gpu or _device_of(tensor).type != "cpu":
        return tensor
    if wait:
        _waits("to")
    return _place(_to(tensor, tensor.dtype, copy=True), gpu)


_to = torch.Tensor.to


def _tensor_to(self: torch.Tensor, *args, copy: bool = False, **kwargs) -> torch.Tensor:
    """``Tensor.to`` in each of its forms."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or self.device, dtype or self.dtype
    if {_device_of(self).type, device.type} - {"cpu", "cuda"}:  # meta
        return _to(self, device, dtype, copy=copy, memory_format=memory_format)
    if device.type != self.device.type:
        copy = True
        if not non_blocking:
            _waits("to")
    result = _to(self, HOST, dtype, copy=copy, memory_format=memory_format or torch.preserve_format)
    return _place(result, device.type == "cuda") if result is not self else self


_wrapper = torch.Tensor._make_wrapper_subclass


def _make_wrapper(cls, *args, device=None, **kwargs) -> torch.Tensor:
    gpu = _is_gpu(device)
    made = _wrapper(cls, *args, device=HOST if gpu else device, **kwargs)
    if gpu:
        setattr(made, _WRAPS, True)
    return made


def _numpy(self: torch.Tensor, *args, **kwargs):
    if on_gpu(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
    return _to_numpy(self, *args, **kwargs)


def _to_list(self: torch.Tensor) -> list:
    if on_gpu(self):
        _waits("tolist")
    return _list_of(self)


_list_of = torch.Tensor.tolist
_to_numpy = torch.Tensor.numpy
_array = torch.Tensor.__array__


def _as_array(self: torch.Tensor, *args, **kwargs):
    if on_gpu(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
    return _array(self, *args, **kwargs)


def _pin(self: torch.Tensor, device=None) -> torch.Tensor:
    if on_gpu(self):
        raise RuntimeError("cannot pin a tensor of the GPU: only dense CPU tensors can be pinned")
    copy = self.clone()
    _list(_pinned, copy)
    return copy


def _tensor_type(self: torch.Tensor, dtype=None, *args, **kwargs):
    answer = _type(self, dtype, *args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if dtype is None and on_gpu(self) else answer


_type = torch.Tensor.type


def _device(self: torch.Tensor) -> torch.device:
    return GPU if on_gpu(self) else _device_of(self)


# ---- torch.cuda


class Stream:
    """On which everything is finished at once."""

    cuda_stream, device = 0, GPU

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait_stream(self, stream):
        pass

    wait_event = wait_stream

    def synchronize(self):
        _waits("Stream.synchronize")

    def query(self):
        return True

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event


class Event:
    def __init__(self, *args, **kwargs):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)

    def query(self):
        return True

    def synchronize(self):
        _waits("Event.synchronize")

    def wait(self, stream=None):
        pass


_stream = Stream()


@contextmanager
def _on_stream(stream):
    yield stream


class Generator(torch.Generator):
    def __new__(cls, device=HOST):
        made = torch._C.Generator.__new__(cls)
        made.of_gpu = _is_gpu(device)
        return made

    @property
    def device(self):
        return GPU if self.of_gpu else HOST


def _torch_cuda(capability: tuple[int, int]) -> None:
    generator = Generator("cuda")
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=capability[0], minor=capability[1], total_memory=80 << 30,
        multi_processor_count=132, warp_size=32, gcnArchName="", L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = dict(
        is_available=True, is_initialized=True, device_count=1, current_device=0, get_device_properties=properties,
        get_device_capability=capability, get_device_name=properties.name, current_stream=_stream,
        default_stream=_stream, is_current_stream_capturing=False, is_bf16_supported=True, memory_allocated=1 << 30,
        max_memory_allocated=2 << 30, memory_reserved=3 << 30, max_memory_reserved=3 << 30,
        mem_get_info=(70 << 30, 80 << 30), memory_stats={}, get_sync_debug_mode=0,
        set_device=None, init=None, _lazy_init=None, empty_cache=None,
        reset_peak_memory_stats=None, set_stream=None, set_sync_debug_mode=None, ipc_collect=None,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda._lazy_call = lambda call, **kwargs: call()
    torch.cuda.synchronize = lambda device=None: _waits("synchronize")
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = Stream, Event, _on_stream
    torch.cuda.default_generators = (generator,)
    for module in (torch.cuda, torch.cuda.random):
        module.manual_seed = module.manual_seed_all = lambda seed: generator.manual_seed(seed) and None
        module.initial_seed = generator.initial_seed
        module.get_rng_state = lambda device=None: generator.get_state()
        module.set_rng_state = lambda state, device=None: generator.set_state(state) and None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None
    torch.Generator = Generator
    torch.cuda.nccl.version = lambda: (2, 27, 3)
    profile = torch.profiler.profile
    torch.profiler.profile = lambda activities=None, **options: profile(
        activities=[torch.profiler.ProfilerActivity.CPU], **options
    )


def _threads() -> None:
    """Operations of every thread."""
    run = threading.Thread.run

    def in_mode(self):
        with Apart():
            run(self)

    threading.Thread.run = in_mode


_mode: Apart | None = None


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Give torch a GPU of this compute capability, once a process, before megatron-core is imported."""
    global _mode
    if _mode is not None:
        return
    _device_constructors()  # which keeps the factories as they are for `with torch.device(...)`
    DeviceContext.__torch_function__ = _in_device_context
    for name in FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in NEW:
        setattr(torch.Tensor, name, _factory(getattr(torch.Tensor, name)))
    patched = dict(
        to=_tensor_to, numpy=_numpy, __array__=_as_array, pin_memory=_pin, type=_tensor_type,
        cpu=lambda self, *args, **kwargs: _move(self, False),
        cuda=lambda self, device=None, non_blocking=False, **kwargs: _move(self, True, not non_blocking),
        tolist=_to_list,
        is_pinned=lambda self, device=None: _listed(_pinned, self),
        record_stream=lambda self, stream: None,
        _make_wrapper_subclass=staticmethod(_make_wrapper),
        get_device=lambda self: 0 if on_gpu(self) else -1,
        device=property(_device), is_cuda=property(on_gpu), is_cpu=property(lambda self: _device(self).type == "cpu"),
    )  # fmt: skip
    for name, value in patched.items():
        setattr(torch.Tensor, name, value)
    _torch_cuda(capability)
    _groups()
    _threads()
    _mode = Apart()
    _mode.__enter__()
    if importlib.util.find_spec("transformer_engine"):
        from tests import transformer_engine_on_cpu

        transformer_engine_on_cpu.install()
