"""Profile steps of a run: a trace for each rank, and a table of the parts of a step."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.target import check_target
from moe_train.config import RunConfig
from moe_train.errors import UserError
from moe_train.training.preflight import check_run
from parallel import cuda_settings
from parallel.rank_env import rank_environment
from parallel.spawn import local_gpus, run_rank, run_ranks

if TYPE_CHECKING:
    from parallel.layout import Layout
    from parallel.topology import Topology

TARGET = "moe_train.profile.run:profile_rank"
WARM_UP = 2
"""Steps before any is timed."""


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step went on one rank. Seconds of one step each; the parts are those of
    `moe_train.profile.parts`."""

    device: str
    step_seconds: float
    """Of the same steps without the profiler."""
    profiled_seconds: float
    """Of a step with it."""
    parts: dict[str, float]
    """On a GPU the time of its kernels, on a CPU that of the operations, shares of `profiled_seconds`."""
    idle: float
    """What is left: on a GPU no kernel ran, on a CPU no operation did (Python between them, or waiting)."""
    host_waits: dict[str, float]
    """How often the host waits for the GPU, by operation and part; on a CPU the operations that would wait."""
    peak_memory: int
    """Bytes allocated at most on a GPU; the process's resident memory on a CPU."""
    tokens_per_second: float
    tflops_per_gpu: float
    mfu: float | None


def profile(config: RunConfig, nproc: int | None, steps: int, out: str, as_json: bool) -> int:
    """Profile ``steps`` steps of ``config`` from its beginning, each of a whole global batch; neither the run's folder
    nor its checkpoints are touched.

    Raises UserError: ``out`` has a trace already, the mixture has not as many steps, or what `pretrain` would raise.
    """
    training = config.training.model_copy(update={"batch_size_warmup": None})
    config = config.model_copy(update={"training": training})
    there = config.mixture.num_samples // training.global_batch_size
    if WARM_UP + 2 * steps > there:
        raise UserError(
            f"--steps {steps} takes {WARM_UP + 2 * steps} steps ({WARM_UP} to warm up, then as many without the "
            f"profiler as with it), and the mixture has {there}; take at most {(there - WARM_UP) // 2}, or give it "
            "more tokens"
        )
    arguments = {
        "config": config.model_dump(mode="json", by_alias=True),
        "steps": steps,
        "out": out,
        "as_json": as_json,
    }
    ranks = rank_environment()
    if ranks is not None and not (ranks.launcher == "slurm" and ranks.world_size == 1):
        ranks.export()
        return run_rank(TARGET, arguments)
    nproc = nproc or local_gpus() or 1
    config.layout(nproc)
    if (check_target(out, "--out", folder=True) / "profile.json").exists():
        raise UserError(f"--out {out} holds a profile already; name another folder")
    return run_ranks(nproc, TARGET, arguments)


def profile_rank(config: dict[str, Any], steps: int, out: str, as_json: bool) -> int:
    """One rank of it; rank 0 writes ``profile.json`` and prints the table."""
    run = RunConfig.model_validate(config)
    environment = rank_environment()
    layout = run.layout(environment.world_size if environment else 1)
    cuda_settings.export(layout)  # before torch is imported, as a run does
    from parallel import engine

    run = run.model_copy(update={"output_dir": str(Path(out) / "run")})
    check_run(run, layout.world_size, "never")
    topology = engine.start(layout, seed=run.training.seed, deterministic=run.training.deterministic)
    from moe_train.training.depth_monitor import parts_through
    from moe_train.training.throughput import Throughput
    from moe_train.training.trainer import Trainer

    trainer = Trainer(run, topology, "never")

    def step() -> None:
        trainer.optimizer.zero_grad()
        trainer.depths.reset()
        trainer.stepper.train(trainer.read_micro_batches())
        trainer.optimizer.update(run.optimizer.lr * 1e-3, trainer.optimizer.gradient_norm())

    def speed(seconds: float) -> dict[str, float | None]:
        totals = topology.sum_over_world(trainer.depths.totals.clone())
        through = parts_through(trainer.depths.figures(totals, run.tokens_per_step))
        flops = run.model.flops_per_token(run.mixture.sequence_length, through)
        throughput = Throughput(layout.world_size, engine.device_name())
        return throughput.measure(run.tokens_per_step, seconds, flops)

    result = profile_steps(step, steps, topology, speed, Path(out))
    trainer.close()
    if topology.rank == 0:
        whole = {**asdict(result), "slice": slice_of(run, layout)}
        (Path(out) / "profile.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(whole) if as_json else render(result, layout.world_size, out))
    engine.stop()
    return 0


def slice_of(run: RunConfig, layout: Layout) -> dict[str, Any]:
    """What a step of the run computes: enough to plan other layouts from its time."""
    training = run.training
    return {
        "world_size": layout.world_size,
        "layers": run.model.num_layers,
        "parameters": run.model.num_parameters(),
        "micro_batches": training.global_batch_size // (training.micro_batch_size * layout.data),
        "micro_batch_size": training.micro_batch_size,
        "sequence_length": run.mixture.sequence_length,
        "precision": training.precision,
        "recompute": training.recompute,
    }


def profile_steps(
    step: Callable[[], None], steps: int, topology: Topology, speed: Callable[[float], dict], out: Path
) -> StepProfile:
    """Time ``steps`` calls of ``step`` after :data:`WARM_UP`, then record as many; every rank calls it.

    Args:
        speed: turns the seconds of the last step into what `Throughput.measure` gives; every rank calls it.
        out: where each rank leaves what :func:`record_steps` writes.
    """
    from parallel import engine

    gpu = topology.device.type == "cuda"
    for _ in range(WARM_UP):
        step()
    plain = time_steps(step, steps, gpu)
    recorded = record_steps(step, steps, gpu, out, topology.rank)
    figures = speed(plain)
    return StepProfile(
        device=engine.device_name(),
        step_seconds=plain,
        **vars(recorded),
        peak_memory=peak_memory(gpu),
        tokens_per_second=figures["tokens_per_second"],
        tflops_per_gpu=figures["tflops_per_gpu"],
        mfu=figures["mfu"],
    )


@dataclass(frozen=True)
class RecordedSteps:
    """What the profiler saw of a step; the fields are those of :class:`StepProfile`."""

    profiled_seconds: float
    parts: dict[str, float]
    idle: float
    host_waits: dict[str, float]


def record_steps(step: Callable[[], None], steps: int, gpu: bool, out: Path | None, rank: int = 0) -> RecordedSteps:
    """Take ``steps`` steps under the profiler. ``out`` gets a trace (chrome://tracing, perfetto) and the names of the
    costliest kernels of this rank; None: neither."""
    import torch

    from moe_train.profile.operations import OWN, host_waits, write_costliest
    from moe_train.profile.parts import busy_time, named_parts, time_by_part

    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    with named_parts(), torch.profiler.profile(activities=activities) as recorded:
        profiled = time_steps(step, steps, gpu, OWN)
    events = recorded.events()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        _write_trace(recorded, out / f"trace_rank_{rank:05d}.json.gz")
        write_costliest(events, gpu, steps, out / f"kernels_rank_{rank:05d}.txt")
    parts = {name: spent / 1e6 / steps for name, spent in time_by_part(events, gpu).items()}
    busy = busy_time(events) / 1e6 / steps if gpu else sum(parts.values())
    return RecordedSteps(profiled, parts, max(0.0, profiled - busy), host_waits(events, gpu, steps))


def time_steps(step: Callable[[], None], steps: int, gpu: bool, label: str = "steps") -> float:
    """Seconds of one of ``steps`` calls of ``step``; waiting for the GPU before and after is in a profiler range
    ``label``."""
    import torch

    def wait() -> None:
        if gpu:
            with torch.profiler.record_function(label):
                torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - began) / steps


def render(result: StepProfile, world_size: int, out: str) -> str:
    """The table of a profile."""
    from moe_train.plan.quantities import table
    from moe_train.profile.parts import MEANING

    whole = sum(result.parts.values()) + result.idle
    meaning = {**MEANING, "idle": "nothing ran: Python between operations, or waiting"}
    rows = [
        [f"{name}: {meaning[name]}", f"{1e3 * seconds:.1f}", f"{100 * seconds / whole:.1f}%"]
        for name, seconds in {**result.parts, "idle": result.idle}.items()
        if seconds or name == "idle"
    ]
    lines = [
        table(f"rank 0 of {world_size}, {result.device}", ["part of a step", "ms", "share"], rows),
        f"a step took {1e3 * result.step_seconds:.1f} ms, {1e3 * result.profiled_seconds:.1f} ms with the profiler;"
        f" {result.tokens_per_second:,.0f} tokens/s, {result.tflops_per_gpu:.4g} TFLOP/s a device"
        + (f", MFU {100 * result.mfu:.1f}%" if result.mfu is not None else "")
        + f"; peak memory {result.peak_memory / 2**30:.2f} GiB",
        f"the host {'would wait for a GPU' if result.device == 'CPU' else 'waits for the GPU'}"
        f" {sum(result.host_waits.values()):g} times a step: "
        + ", ".join(f"{name} {count:g}" for name, count in result.host_waits.items()),
        "operations counted: matrix products of forward and backward, top_k experts, head; recomputation not",
        f"traces, for chrome://tracing or ui.perfetto.dev: {out}/trace_rank_*.json.gz; kernels by name: "
        f"{out}/kernels_rank_*.txt",
    ]
    return "\n".join(lines)


def peak_memory(gpu: bool) -> int:
    """Bytes."""
    if gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write_trace(recorded, path: Path) -> None:
    plain = path.with_suffix("")
    recorded.export_chrome_trace(str(plain))
    with open(plain, "rb") as source, gzip.open(path, "wb", compresslevel=3) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
