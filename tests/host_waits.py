"""Where the host would wait for a GPU: every read of a tensor's value, and every operation whose result is as large as
values say.

Shown on a CPU, where nothing waits: what is counted is what would ask the device."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
READS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
"""Those that are no operation of their own on a CPU."""
BUILDS = {torch.tensor, torch.as_tensor}
"""From numbers, and from lists of tensors, of which it reads each."""
READ_OR_SIZED_BY_VALUES = (
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave",
    "bincount",
)


@contextlib.contextmanager
def host_waits() -> Iterator[list[str]]:
    """Fills a list with ``operation in file:function`` while it is open; the file is the innermost of the project's."""
    found: list[str] = []
    with _Dispatch(found), _Functions(found):
        yield found


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS or func in BUILDS and _holds_a_tensor(args[0]):
            self.found.append(f"{func.__name__} in {_place()}")
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    """All others, also inside of operations and in the backward."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READ_OR_SIZED_BY_VALUES or by_mask:
            self.found.append(f"{name} in {_place()}")
        return func(*args, **(kwargs or {}))


def _holds_a_tensor(values) -> bool:
    if isinstance(values, (list, tuple)):
        return any(isinstance(value, torch.Tensor) or _holds_a_tensor(value) for value in values)
    return False


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.name != "host_waits.py":
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return "elsewhere"
