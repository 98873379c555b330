"""Environment variables that training on NVIDIA's GPUs wants, each with its reason. What the user has set stays."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import NamedTuple

from parallel.layout import Layout


class Setting(NamedTuple):
    """An environment variable, the value that it gets unless it has one, and why; ``synonym`` is another name of it."""

    name: str
    value: str
    reason: str
    synonym: str = ""


ALWAYS = (
    Setting(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "dropless routing gives tensors of another size each step; segments that grow are not fragmented by it",
        synonym="PYTORCH_ALLOC_CONF",
    ),
    Setting(
        "NCCL_NVLS_ENABLE",
        "0",
        "NVLink SHARP reserves GPU memory for every communicator, and a layout has many; it speeds up all-reduce, of "
        "which there is little",
    ),
)
TENSOR_PARALLEL = Setting(
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "1",
    "with one hardware queue kernels start in the order of their launch, so that a tensor-parallel layer's "
    "communication starts before the product that hides it (GPUs up to Hopper)",
)


def settings(layout: Layout) -> tuple[Setting, ...]:
    """What a run of this layout wants."""
    return (*ALWAYS, TENSOR_PARALLEL) if layout.tensor > 1 else ALWAYS


def export(layout: Layout, environ: MutableMapping[str, str] = os.environ) -> None:
    """Put the settings into the environment; before CUDA is used for the first time."""
    for setting in settings(layout):
        if setting.synonym not in environ:
            environ.setdefault(setting.name, setting.value)
