"""What has the host wait for the GPU."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.cuda_look_alike.sides import on_gpu

ROOT = Path(__file__).resolve().parents[2]
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
"""Operations whose indices may lie on the host, whatever is indexed."""
found: list[str] | None = None
"""While it is a list: ``operation in file:function`` of each call that has the host wait for the GPU, by the innermost
of the project's functions."""
SIZED_BY_VALUES = (
    "equal nonzero masked_select unique _unique2 unique_consecutive repeat_interleave bincount _local_scalar_dense"
).split()


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """A list of what has the host wait for the GPU, filled while it is open."""
    global found
    found = []
    try:
        yield found
    finally:
        found = None


def note_operation(name: str, args: tuple, kwargs: dict, operands: list[torch.Tensor], crosses: bool) -> None:
    """Note an operation in which the host waits; ``crosses``: its tensors are on both sides."""
    if name in SIZED_BY_VALUES and any(on_gpu(each) for each in operands):
        note(name)
    elif name in INDEXED and on_gpu(args[0]):
        indices = [each for each in args[1] if each is not None]
        masked = any(each.dtype in (torch.bool, torch.uint8) for each in indices)
        filled = name != "index" and args[2].dim() == 0  # with a number: no row is counted
        if masked and not filled or not all(on_gpu(each) for each in indices):
            note(name)
    elif name == "copy_" and crosses and not (args[2:] or [kwargs.get("non_blocking")])[0]:
        if _is_ours(_callers()[-1]):  # others' are gloo's, out of a buffer of its own
            note(name)


def note(name: str) -> None:
    """Note a call, while somebody asks."""
    if found is None:
        return
    ours = [frame for frame in _callers() if _is_ours(frame)]
    found.append(f"{name} in {Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name}" if ours else name)


def _is_ours(frame: traceback.FrameSummary) -> bool:
    path = Path(frame.filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def _callers() -> list[traceback.FrameSummary]:
    """Who calls what is here, the innermost last."""
    return [
        frame
        for frame in traceback.extract_stack()
        if Path(__file__).parent not in Path(frame.filename).parents
        and not frame.filename.endswith(("_compile.py", "eval_frame.py"))
    ]
