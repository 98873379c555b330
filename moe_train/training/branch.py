"""``moe-train branch``: a new run that goes on from a checkpoint of another, optimizer and data position kept.

A run that was stable can be decayed from any of its checkpoints, as often as wanted: the mixture of the new run says how
many tokens the decay has.
"""
from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from moe_train.config import load_run
from moe_train.errors import UserError
from moe_train.training.run import pretrain
from moe_train.training.run_folder import RunFolder


def branch(source: str, new: str, overrides: Iterable[str] = (), nproc: int | None = None) -> int:
    """Start the run of ``new`` from the checkpoint ``RUN_DIR@STEP``; the exit status of the run.

    The metrics of the steps before are copied, so that the new run's curve is whole.

    Raises:
        UserError: ``source`` names no checkpoint, or the new run's folder holds a run already.
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
    folder = RunFolder(config.output_dir)
    if folder.holds_run:
        raise UserError(f"{folder.path} holds a run already: set another output_dir in {new}, or go on with it by moe-train pretrain")
    folder.path.mkdir(parents=True, exist_ok=True)
    if origin.metrics_path.exists():
        shutil.copyfile(origin.metrics_path, folder.metrics_path)
    folder.event("branch", step, origin=str(Path(match[1]).resolve()))
    return pretrain(config, nproc, str(checkpoint))
