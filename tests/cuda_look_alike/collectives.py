"""Process groups over NCCL, which exchange over gloo and take what NCCL takes."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from tests.cuda_look_alike.sides import GPU, on_gpu, tensors

_backends: dict[str, str] = {}
"""What a process group was asked to be, by its name."""
NCCL_HAS_NO = ("monitored_barrier_", "recv_any_source_")


def check_collective(name: str, args: tuple) -> None:
    """Raise for what the group's backend would not take."""
    if name == "barrier":
        return
    (group,) = (each for each in args if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()))
    backend = _backends[dist.ProcessGroup.unbox(group).group_name]
    if backend == "nccl" and name in NCCL_HAS_NO:
        raise RuntimeError(f"NCCL has no {name}")
    for tensor in tensors(args):
        if on_gpu(tensor) != (backend == "nccl"):
            raise RuntimeError(f"{name} over {backend}: a tensor {tuple(tensor.shape)} of {tensor.device}")
        if backend == "nccl" and not tensor.is_contiguous():
            raise RuntimeError(f"{name}: NCCL wants contiguous tensors")


def install() -> None:
    """Have groups over NCCL exchange over gloo."""
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
