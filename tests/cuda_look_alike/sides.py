"""Which tensors are on the GPU, by their storages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_iter

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)

there: dict[int, StorageWeakRef] = {}
"""The storages on the GPU, by their address, which is nobody else's while the reference is there."""
pinned: dict[int, StorageWeakRef] = {}
WRAPS = "_wraps_tensors_of_the_gpu"
"""Attribute of a tensor that is made of others."""
device_of = torch.Tensor.device.__get__
storage_of = torch._C.TensorBase.untyped_storage


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of the GPU's."""
    return WRAPS in vars(tensor) or listed(there, tensor)


def listed(where: dict[int, StorageWeakRef], tensor: torch.Tensor) -> bool:
    """Whether its storage is in that table."""
    if device_of(tensor).type != "cpu" or tensor.layout != torch.strided:
        return False
    entry = where.get(storage_of(tensor)._cdata)
    return entry is not None and not entry.expired()


def put(where: dict[int, StorageWeakRef], tensor: torch.Tensor) -> None:
    """Enter its storage into a table, and now and then let go of those that are no more."""
    storage = storage_of(tensor)
    where[storage._cdata] = StorageWeakRef(storage)
    if len(where) > 2 * put.kept:
        for key in [key for key, entry in list(where.items()) if entry.expired()]:
            del where[key]
        put.kept = max(1000, len(where))


put.kept = 1000


def place(result: Any, gpu: bool) -> Any:
    """Note where the tensors of a result lie."""
    for tensor in tensors(result):
        if gpu:
            put(there, tensor)
        else:
            there.pop(storage_of(tensor)._cdata, None)
    return result


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """All in nested values that have memory."""
    return (each for each in tree_iter(values) if isinstance(each, torch.Tensor) and device_of(each).type == "cpu")
