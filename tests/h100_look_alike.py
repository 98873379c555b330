"""A GPU for constructors alone: torch.cuda answers as on an H100, tensors stay on the meta device.

Transformer Engine's modules ask the device what it is before they make their first parameter, on the meta device too.
Nothing can be computed.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch


class _Nothing:
    """A stream or an event on which nothing happens."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@contextmanager
def looks_like_an_h100(capability: tuple[int, int] = (9, 0)):
    """In it ``torch.cuda`` describes one device of that compute capability."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=capability[0],
        minor=capability[1],
        total_memory=80 << 30,
        multi_processor_count=132,
        warp_size=32,
    )
    answers = {
        "is_available": True,
        "current_device": torch.device("meta"),
        "device_count": 1,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "current_stream": _Nothing(),
        "get_rng_state": torch.get_rng_state(),
        "is_initialized": True,
    }
    silent = ("synchronize", "set_rng_state", "manual_seed", "init", "_lazy_init", "_lazy_call", "set_device")
    with mock.patch.multiple(
        torch.cuda,
        **{name: mock.Mock(return_value=value) for name, value in answers.items()},
        **{name: mock.Mock(return_value=None) for name in silent},
        Stream=_Nothing,
        Event=_Nothing,
    ):
        yield
