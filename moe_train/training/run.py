"""``moe-train pretrain``: check, start the ranks, and leave an outcome whatever happens."""
from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig
from moe_train.errors import StoppedError
from moe_train.training.fence import Fence, FencedError, taken_over
from moe_train.training.preflight import check_run, completion
from moe_train.training.run_folder import RunFolder, now
from parallel.spawn import rank_environment, rank_log_path, run_rank, run_ranks

TARGET = "moe_train.training.run:train_rank"


def pretrain(config: RunConfig, nproc: int | None, resume: str) -> int:
    """Train, or go on with, the run of ``config``; the exit status of the run.

    Under torchrun, or as a task of srun, this process is one of the ranks; else ``nproc`` ranks are started here
    (default: one a GPU, or one).
    """
    ranks = rank_environment()
    if ranks is not None:
        ranks.export()
        return run_rank(TARGET, _payload(config, resume), RunFolder(config.output_dir).logs)
    nproc = nproc or _local_gpus() or 1
    check_run(config, nproc, resume)
    done = completion(config) if resume == "auto" else None
    if done:
        print(done)
        return 0
    folder, since = RunFolder(config.output_dir), now()
    code = run_ranks(nproc, TARGET, _payload(config, resume), folder.logs)
    if not taken_over(folder.path, since):
        folder.settle(code, REASONS.get(code, "a rank failed"), since)
    return code


REASONS = {
    0: "complete",
    2: "a user's mistake",
    3: "stopped",
    4: "damaged data or checkpoint",
    5: "a rank was lost or hung",
    6: "stopped by policy",
}


def train_rank(config: dict[str, Any], resume: str) -> int:
    """One rank of a run. Rank 0 leaves outcome.json, also for a start that failed before there was anything to record."""
    since, run = now(), RunConfig.model_validate(config)
    environment = rank_environment()
    try:
        return _start_and_train(run, environment.world_size if environment else 1, resume)
    except BaseException as error:
        if (environment is None or environment.rank == 0) and not isinstance(error, FencedError):
            RunFolder(run.output_dir).settle(getattr(error, "exit_code", 1), str(error) or type(error).__name__, since)
        raise


def _start_and_train(run: RunConfig, world_size: int, resume: str) -> int:
    from parallel import engine  # the first import of megatron-core: it takes seconds

    changes = check_run(run, world_size, resume)
    topology = engine.start(
        run.layout(world_size),
        seed=run.training.seed,
        deterministic=run.training.deterministic,
        timeout=timedelta(seconds=4 * run.faults.step_timeout),
    )
    try:
        return _train(run, topology, resume, changes)
    finally:
        engine.stop()


def _train(run: RunConfig, topology, resume: str, changes: list) -> int:
    from moe_train.checkpoint.save import Checkpointer
    from moe_train.training.loop import train
    from moe_train.training.recorder import Recorder
    from moe_train.training.signals import StopRequest
    from moe_train.training.trainer import Trainer
    from moe_train.training.watchdog import Watchdog

    first = topology.rank == 0
    fence = Fence.take(Path(run.output_dir)) if first else None
    trainer = Trainer(run, topology, resume)
    recorder = Recorder(trainer, changes, fence)
    stop_file = trainer.folder.stop_path if first else None
    watchdog = Watchdog(run.faults.step_timeout, rank_log_path(trainer.folder.logs, topology.rank))
    tokenizer = Path(run.mixture.tokenizer) if run.mixture.tokenizer else None
    checkpointer = Checkpointer(
        trainer.folder.checkpoints,
        run.checkpoint,
        trainer.model,
        trainer.optimizer,
        topology,
        tokenizer,
        warn=recorder.warn,
        saved=recorder.saved,
        may_commit=fence.check if fence else lambda: None,
    )
    try:
        with StopRequest(stop_file, run.training.max_wall_time) as stop:
            reason = train(trainer, recorder, checkpointer, stop, watchdog)
    except BaseException as error:
        checkpointer.close()
        if isinstance(error, FencedError):
            recorder.close(error.exit_code)
        else:
            recorder.finish(getattr(error, "exit_code", 1), str(error) or type(error).__name__)
        raise
    finally:
        trainer.close()
    recorder.finish(StoppedError.exit_code if reason else 0, reason or "complete")
    if fence:
        fence.release()
    return StoppedError.exit_code if reason else 0


def _payload(config: RunConfig, resume: str) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json", by_alias=True), "resume": resume}


def _local_gpus() -> int:
    """GPUs of this machine, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").exists() else 0
