"""Start the engine: megatron-core on torch.distributed, NCCL on GPUs and gloo on CPUs.

Everything that touches a process group, ``megatron.core.parallel_state`` or the device goes through this package.
Import this module before any other part of megatron-core: it keeps that library's import-time warnings from the user
and, where there is no CUDA, puts the CPU backend in place.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r".*`torch.distributed\..*is deprecated")
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|apex|nvidia-modelopt|Triton).*")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def _import_megatron() -> None:
    """Import megatron-core without what no rank calls, on a CPU much of the time that one takes to start.

    It imports trackers, for which rank 0 has uses of its own, later and only where they are asked for. And it hands its
    fused functions to torch.compile, which brings in the compiler, for functions that nobody calls on a CPU.
    """
    trackers = {name: None for name in ("wandb", "tensorboard") if name not in sys.modules}
    compile_function, on_cpu = torch.compile, not torch.backends.cuda.is_built()
    sys.modules.update(trackers)  # None: it cannot be imported
    if on_cpu:
        torch.compile = lambda function=None, **_: function or (lambda each: each)
    try:
        from megatron.core import jit
    finally:
        torch.compile = compile_function
        for name in trackers:
            del sys.modules[name]
    if on_cpu:
        jit.disable_jit_fuser()  # for what is imported later


_import_megatron()

from parallel import cuda_settings  # noqa: E402
from parallel.apex import find_apex  # noqa: E402
from parallel.errors import EngineError, RendezvousError  # noqa: E402
from parallel.layout import Layout  # noqa: E402
from parallel.topology import Topology  # noqa: E402

MEGATRON_VERSION = "0.16.1"


def check_megatron() -> None:
    """Raise :class:`EngineError` unless the pinned megatron-core (and psutil, which it needs and does not declare) is
    installed, and no package that it would mistake for NVIDIA's Apex."""
    for package, wanted in (("megatron-core", MEGATRON_VERSION), ("psutil", None)):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise EngineError(
                f"{package} is not installed: pip install '{package}{'==' + wanted if wanted else ''}'"
            ) from None
        if wanted and found != wanted:
            raise EngineError(
                f"megatron-core {found} is installed, this version of the framework is built on {wanted}: "
                f"pip install 'megatron-core=={wanted}'"
            )
    find_apex()


def use_cuda() -> bool:
    """Whether this process trains on a GPU."""
    return torch.cuda.is_available()


def device_name() -> str:
    """What this process trains on: the GPU's name, or ``CPU``."""
    return torch.cuda.get_device_name() if use_cuda() else "CPU"


def start(
    layout: Layout, *, seed: int, deterministic: bool = False, timeout: timedelta = timedelta(minutes=30)
) -> Topology:
    """Join the other ranks and form the groups of ``layout``.

    The rendezvous is torch's ``env://`` (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without these variables the
    process is a world of one. Seeds every random generator from ``seed`` (no operation of the model draws from them;
    they are seeded for what users add). With ``deterministic`` torch takes reproducible kernels; an operation that has
    none raises, for the backward of torch's fused attention is only reproducible where torch may not merely warn.

    Raises:
        EngineError: megatron-core is missing or of another version, or the world has another size than the layout.
    """
    check_megatron()
    if use_cuda():
        cuda_settings.export(layout)
        if deterministic:  # cuBLAS reads it when it makes its first handle
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    else:
        from parallel import cpu_backend

        cpu_backend.install()
    if not dist.is_initialized():
        _join(timeout)
    if dist.get_world_size() != layout.world_size:
        raise EngineError(
            f"{dist.get_world_size()} ranks were started but the layout is {layout.describe()}: start "
            f"{layout.world_size} ranks"
        )
    global _layout
    if layout != _layout:
        _dissolve_groups()
        _form_groups(layout, timeout)
        _layout = layout
    seed_everything(seed)
    # What torch.use_deterministic_algorithms does, but for importing the compiler to tell it.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    return Topology.current(layout)


_layout: Layout | None = None  # whose groups are formed


def _form_groups(layout: Layout, timeout: timedelta) -> None:
    from megatron.core import parallel_state

    virtual = layout.virtual_pipeline if (layout.virtual_pipeline or 1) > 1 else None
    with nullcontext() if use_cuda() else _one_group_for_the_same_ranks():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout / timedelta(minutes=1),
        )


@contextmanager
def _one_group_for_the_same_ranks() -> Iterator[None]:
    """Have megatron-core's groups of the same ranks, of which it forms more than ten, be one group.

    Each gloo group has threads of its own that wake up a hundred times a second, and takes a rendezvous to form. On
    GPUs every one keeps a communicator of its own, so that their communication can overlap.
    """
    formed: dict[tuple, dist.ProcessGroup] = {}
    new_group = dist.new_group

    def formed_once(ranks, *args, **kwargs):
        key = tuple(ranks)
        if key not in formed:
            formed[key] = new_group(ranks, *args, **kwargs)
        return formed[key]

    dist.new_group = formed_once
    try:
        yield
    finally:
        dist.new_group = new_group


def _dissolve_groups() -> None:
    """Close the groups of the last layout: megatron-core only forgets them, and each keeps threads and connections."""
    from megatron.core import parallel_state

    global _layout
    groups = parallel_state._global_process_group_list or ()
    for group in {id(group): group for group in groups if group is not None}.values():  # None stands for the world
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    _layout = None


def let_rank_zero_end_first(seconds: float = 60.0) -> None:
    """Return at once on rank 0; on the others when rank 0 has called it too, or has gone, or after ``seconds``.

    Where one rank's end ends the others, as under srun, what rank 0 has to write at the end would be cut off. No
    collective: none of the others fails, or waits for long, where rank 0 does.
    """
    if not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    with suppress(dist.DistError):
        if dist.get_rank() == 0:
            store.set("rank 0 ends", "")
        else:
            store.wait(["rank 0 ends"], timedelta(seconds=seconds))


def stop() -> None:
    """Leave the groups. Safe to call when the engine never started."""
    if dist.is_initialized():
        _dissolve_groups()
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators, and megatron-core's tracker on GPUs."""
    random.seed(seed)
    torch.manual_seed(seed)
    if use_cuda():
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)


def _join(timeout: timedelta) -> None:
    """Initialise torch.distributed from the environment, or alone without it."""
    backend = "nccl" if use_cuda() else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise RendezvousError(
                f"port {os.environ.get('MASTER_PORT')} of this host, where the ranks meet, is in use: start again, or "
                "set MASTER_PORT to another one"
            ) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
