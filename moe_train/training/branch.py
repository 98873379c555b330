"""``moe-train branch``: a new run that goes on from a checkpoint of another, optimizer and data position kept.

A run that was stable can be decayed from any of its checkpoints, as often as wanted: the mixture of the new run says
how many tokens the decay has.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moe_train.checkpoint.folder import WRITING, commit
from moe_train.config import load_run
from moe_train.errors import UserError
from moe_train.training.preflight import check_mixture
from moe_train.training.run import pretrain
from moe_train.training.run_folder import RunFolder
from moe_train.training.tracking import new_run_id
from parallel.rank_env import rank_environment


def branch(source: str, new: str, overrides: Iterable[str] = (), nproc: int | None = None) -> int:
    """Start the run of ``new`` from the checkpoint ``RUN_DIR@STEP``; the exit status of the run.

    The checkpoint is linked (copied, on another file system) into the new run's folder, so that a start of the new run
    that is interrupted before its first save goes on from there; the metrics of the steps before are copied, so that
    its curve is whole. A branch that is interrupted before all that is there can be started again. Under torchrun or
    srun rank 0 does so; the others meet it when the ranks join.

    Raises:
        UserError: ``source`` names no checkpoint, the new run's folder holds a run already, or the copy fails.
    """
    match = re.fullmatch(r"(.+)@(\d+)", source)
    if not match:
        raise UserError(f"{source}: write the origin as RUN_DIR@STEP, such as runs/demo@200")
    origin, step = RunFolder(match[1]), int(match[2])
    checkpoint = origin.checkpoints / f"iter_{step:07d}"
    if not checkpoint.is_dir():
        there = sorted(int(path.name[5:]) for path in origin.checkpoints.glob("iter_" + "[0-9]" * 7))
        raise UserError(f"{source}: {origin.path} has no checkpoint of step {step}; it has {there or 'none'}")
    config = load_run(new, overrides)
    check_mixture(config, str(checkpoint))
    ranks = rank_environment()
    if ranks is None or ranks.rank == 0:
        _prepare(RunFolder(config.output_dir), origin, checkpoint, step, new)
    return pretrain(config, nproc, "auto")


def _prepare(folder: RunFolder, origin: RunFolder, checkpoint: Path, step: int, new: str) -> None:
    """Make ``folder`` that of a run that stands at ``checkpoint``: it holds none until all of it is there."""
    for left in folder.checkpoints.glob(f"iter_*{WRITING}.branch"):  # a branch that was interrupted
        shutil.rmtree(left, ignore_errors=True)
    if folder.holds_run:
        raise UserError(
            f"{folder.path} holds a run already: set another output_dir in {new}, or go on with it by moe-train "
            "pretrain"
        )
    writing = folder.checkpoints / f"{checkpoint.name}{WRITING}.branch"
    metrics, has_metrics = folder.metrics_path.with_suffix(".part"), origin.metrics_path.exists()
    try:
        shutil.copytree(checkpoint, writing, copy_function=_link)
        if has_metrics:
            shutil.copyfile(origin.metrics_path, metrics)
        new_run_id(folder.path)  # not the origin's, which the checkpoint carries
        commit(folder.checkpoints / checkpoint.name, writing)
        if has_metrics:
            metrics.rename(folder.metrics_path)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        with suppress(OSError):
            metrics.unlink()
        raise UserError(
            f"{checkpoint} cannot be copied into {folder.path} ({_reason(error)}); see to that, then start the branch "
            "again"
        ) from None
    folder.event("branch", step, origin=str(origin.path.resolve()))


def _reason(error: OSError) -> str:
    """What went wrong, in one line; a copied folder has a list of it."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][2])
    return f"{error.strerror}: {error.filename}" if error.strerror else str(error)


def _link(source: str, target: str) -> None:
    """No file of a checkpoint is ever changed: a second name for it will do."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
