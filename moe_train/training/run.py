"""``moe-train pretrain``: check, start the ranks, and leave an outcome whatever happens."""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from moe_train.config import RunConfig
from moe_train.errors import StoppedError, UserError
from moe_train.training.fence import Fence, FencedError, held_before, owner_of, taken_over
from moe_train.training.memory_check import check_gpu_memory, check_host_memory
from moe_train.training.preflight import check_run, completion
from moe_train.training.run_folder import RunFolder, now
from moe_train.training.signals import StopRequest
from parallel import cuda_settings
from parallel.errors import file_mistake
from parallel.rank import exit_status, is_lost_connection
from parallel.spawn import local_gpus, rank_environment, rank_log_path, run_rank, spawn_ranks, tell

TARGET = "moe_train.training.run:train_rank"


def pretrain(config: RunConfig, nproc: int | None, resume: str) -> int:
    """Train, or go on with, the run of ``config``; the exit status of the run.

    Under torchrun, or as one of several tasks of srun, this process is one of the ranks; else ``nproc`` ranks are
    started here (default: one a GPU, or one). A single task of srun may be an interactive shell: it starts ranks like
    any other.
    """
    ranks = rank_environment()
    if ranks is not None and not (ranks.launcher == "slurm" and ranks.world_size == 1):
        if nproc is not None:
            starter = "srun" if ranks.launcher == "slurm" else "torchrun"
            raise UserError(
                f"--nproc {nproc}: this process is rank {ranks.rank} of {ranks.world_size} that {starter} started; "
                "leave --nproc out"
            )
        RunFolder(config.output_dir).require_writable()
        ranks.export()
        return run_rank(*rank_target(config, resume))
    gpus = local_gpus()
    nproc = nproc or gpus or 1
    if 0 < gpus < nproc:
        raise UserError(
            f"--nproc {nproc} but this machine shows {gpus} GPU{'s' * (gpus > 1)}: start at most one rank a GPU, or "
            "set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    folder, since = RunFolder(config.output_dir), now()
    try:
        check_run(config, nproc, resume)
        done = completion(config) if resume == "auto" else None
        if not gpus and not done:
            check_host_memory(config, nproc)
        folder.require_writable()
    except Exception as error:
        leave_outcome(folder, error, since)
        raise
    if done:
        print(done)
        return 0
    result = spawn_ranks(nproc, *rank_target(config, resume))
    tell(result, folder.logs)
    if not _is_of_another(folder, since):
        folder.settle(result.code, result.message or REASONS.get(result.code, "a rank failed"), since)
    return result.code


REASONS = {
    0: "complete",
    2: "a user's mistake",
    3: "stopped",
    4: "damaged data or checkpoint",
    5: "a rank was lost or hung",
    6: "stopped by policy",
}


def rank_target(config: RunConfig, resume: str) -> tuple[str, dict[str, Any], Path]:
    """What each rank of a run calls: the function, its arguments, and the folder of the ranks' logs."""
    return TARGET, _payload(config, resume), RunFolder(config.output_dir).logs


def train_rank(config: dict[str, Any], resume: str) -> int:
    """One rank of a run."""
    began, since, run = time.monotonic(), now(), RunConfig.model_validate(config)
    environment = rank_environment()
    rank, world_size = (environment.rank, environment.world_size) if environment else (0, 1)
    folder, first = RunFolder(run.output_dir), rank == 0

    def leave(reason: str) -> None:
        """For an end at once: unless another start has the folder, or a rank that failed said why all have to end."""
        if first and not _is_said(folder, since) and not _is_of_another(folder, since):
            folder.settle(StoppedError.exit_code, reason, since)

    try:
        # From here on: a signal while the ranks load is told as such.
        with StopRequest(
            folder.stop_path if first else None, run.training.max_wall_time, began, leave, loading=True
        ) as stop:
            if first:
                folder.clear_stop()
            return _start_and_train(run, world_size, resume, stop, since)
    except BaseException as error:
        leave_outcome(folder, error, since, rank)
        raise


def leave_outcome(folder: RunFolder, error: BaseException, since: str, rank: int = 0) -> None:
    """Have outcome.json say how a start failed, whoever started the ranks: the rank that knows the cause writes it.

    A rank that only lost its connection to another one does not overwrite what that one wrote, nor does one that has
    lost the folder to another start, or never took it from one that is at work there.

    Args:
        since: `now()` from the beginning of this process: an outcome older than that is of an earlier start.
    """
    lost = is_lost_connection(error)
    if isinstance(error, FencedError) or (lost and (rank > 0 or _is_said(folder, since))):
        return
    if held_before(folder.path, since):
        return
    text = "lost the connection to another rank, whose log may say why" if lost else _told(error)
    folder.settle(exit_status(error), text if rank == 0 else f"rank {rank}: {text}", since)


def _told(error: BaseException) -> str:
    """What outcome.json says of it."""
    return file_mistake(error) or str(error) or type(error).__name__


def _is_of_another(folder: RunFolder, since: str) -> bool:
    """For a first rank, or the process above it: whether the folder is another start's to write in."""
    return taken_over(folder.path, since) or held_before(folder.path, since)


def _is_said(folder: RunFolder, since: str) -> bool:
    """Whether a rank has left an outcome since this one began; its own beginning may have been a moment before."""
    return (folder.read_outcome().get("ended") or "") >= since


def _start_and_train(run: RunConfig, world_size: int, resume: str, stop: StopRequest, since: str) -> int:
    cuda_settings.export(run.layout(world_size))  # before torch is imported, parts of which ask CUDA for its devices
    from parallel import engine  # the first import of megatron-core: it takes seconds

    changes = check_run(run, world_size, resume)
    topology = engine.start(
        run.layout(world_size),
        seed=run.training.seed,
        deterministic=run.training.deterministic,
        timeout=timedelta(seconds=11 * run.faults.step_timeout),  # the watchdog, which allows 10, speaks first
    )
    if (memory := topology.device_memory) is not None:
        check_gpu_memory(run, topology.layout, topology.rank, memory)
    status = _train(run, topology, resume, changes, stop, since)
    engine.let_rank_zero_end_first()  # it writes how the run ended
    # Not after an error: leaving the groups may wait for ranks that have gone, or for collectives that nobody joins any
    # more.
    engine.stop()
    return status


def _train(run: RunConfig, topology, resume: str, changes: list, stop: StopRequest, since: str) -> int:
    fence = Fence.take(Path(run.output_dir)) if topology.rank == 0 else None
    with ExitStack() as at_the_end:
        if fence:
            at_the_end.callback(fence.release)
        try:
            return _train_as_owner(run, topology, resume, changes, stop, since, fence)
        except Exception:
            if fence:
                fence.check()  # whatever failed, the folder and its outcome may be another start's by now
            raise


def _train_as_owner(
    run: RunConfig, topology, resume: str, changes: list, stop: StopRequest, since: str, fence: Fence | None
) -> int:
    from moe_train.checkpoint.load import give_up_later
    from moe_train.checkpoint.save import Checkpointer
    from moe_train.training.agreement import check_agreement
    from moe_train.training.loop import train
    from moe_train.training.recorder import Recorder
    from moe_train.training.trainer import Trainer
    from moe_train.training.watchdog import EXIT_HANG, Watchdog

    folder, owner = RunFolder(run.output_dir), topology.from_rank_zero(fence.owner if fence else None)

    def hung(reason: str) -> None:
        """For an end at once: unless another start has the folder by now."""
        if owner_of(folder.path) == owner:
            folder.settle(EXIT_HANG, reason, since)

    watchdog = Watchdog(run.faults.step_timeout, rank_log_path(folder.logs, topology.rank), before_exit=hung)
    watchdog.arm("the start", 10 * run.faults.step_timeout)
    # The mixture first: the run's schedule follows from it.
    check_agreement(topology, {"the mixture": run.mixture.model_dump_json(), "the run file": run.to_yaml()})
    trainer = Trainer(run, topology, resume)
    check_agreement(topology, {"the ledger of what was fed": trainer.ledger.to_json()})
    if fence:
        fence.check()  # loading takes its time, and from here on files of the run are cut and set aside
    if resume not in ("auto", "never"):
        give_up_later(folder.checkpoints, trainer.resumed_from, topology)
    recorder = Recorder(trainer, changes, fence)
    if topology.rank == 0:
        stop.on_signal = lambda name: folder.event("signal", trainer.position.step, signal=name)
    tokenizer = Path(run.mixture.tokenizer) if run.mixture.tokenizer else None
    checkpointer = Checkpointer(
        folder.checkpoints,
        run.checkpoint,
        trainer.model,
        trainer.optimizer,
        topology,
        tokenizer,
        warn=recorder.warn,
        saved=recorder.saved,
        may_commit=fence.check if fence else lambda: None,
        mirror=trainer.mirror,
    )
    try:
        stop.begin()
        reason = train(trainer, recorder, checkpointer, stop, watchdog)
    except BaseException as error:
        checkpointer.close()
        recorder.close(exit_status(error), _told(error))
        raise
    finally:
        trainer.close()
    recorder.finish(StoppedError.exit_code if reason else 0, reason or "complete")
    return StoppedError.exit_code if reason else 0


def _payload(config: RunConfig, resume: str) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json", by_alias=True), "resume": resume}
