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

import importlib.util
import threading

from tests.cuda_look_alike import collectives, device, tensors
from tests.cuda_look_alike.operations import Apart

_mode: Apart | None = None


def install() -> None:
    """Give torch a GPU, once a process, before megatron-core is imported."""
    global _mode
    if _mode is not None:
        return
    for part in (tensors, device, collectives):
        part.install()
    run = threading.Thread.run

    def in_mode(thread: threading.Thread) -> None:
        with Apart():
            run(thread)

    threading.Thread.run = in_mode
    _mode = Apart()
    _mode.__enter__()
    if importlib.util.find_spec("transformer_engine"):
        from tests import transformer_engine_on_cpu

        transformer_engine_on_cpu.install()
