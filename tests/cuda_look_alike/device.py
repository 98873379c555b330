"""``torch.cuda`` with one H100, on which everything is finished at once."""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from tests.cuda_look_alike.host_waits import note
from tests.cuda_look_alike.sides import GPU, HOST


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
        note("Stream.synchronize")

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
        note("Event.synchronize")

    def wait(self, stream=None):
        pass


_stream = Stream()


@contextmanager
def _on_stream(stream):
    yield stream


class Generator(torch.Generator):
    def __new__(cls, device=HOST):
        made = torch._C.Generator.__new__(cls)
        made.of_gpu = torch.device(device).type == "cuda"
        return made

    @property
    def device(self):
        return GPU if self.of_gpu else HOST


def install() -> None:
    """Replace ``torch.cuda``, and what else asks the device."""
    generator = Generator("cuda")
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30,
        multi_processor_count=132, warp_size=32, gcnArchName="", L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = dict(
        is_available=True, is_initialized=True, device_count=1, current_device=0, get_device_properties=properties,
        get_device_capability=(9, 0), get_device_name=properties.name, current_stream=_stream,
        default_stream=_stream, is_current_stream_capturing=False, is_bf16_supported=True, memory_allocated=1 << 30,
        max_memory_allocated=2 << 30, memory_reserved=3 << 30, max_memory_reserved=3 << 30,
        mem_get_info=(70 << 30, 80 << 30), memory_stats={}, get_sync_debug_mode=0,
        set_device=None, init=None, _lazy_init=None, empty_cache=None,
        reset_peak_memory_stats=None, set_stream=None, set_sync_debug_mode=None, ipc_collect=None,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda._lazy_call = lambda call, **kwargs: call()
    torch.cuda.synchronize = lambda device=None: note("synchronize")
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
