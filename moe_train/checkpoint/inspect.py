"""``moe-train checkpoint list`` and ``verify``."""
from __future__ import annotations

import time
from pathlib import Path

from moe_train.checkpoint.folder import checkpoints, read_run_state, resolve_checkpoint
from moe_train.checkpoint.manifest import check_files, read_manifest
from moe_train.checkpoint.retention import is_verified, mark_verified
from moe_train.errors import DamagedError, UserError


def list_checkpoints(run: str | Path) -> int:
    """Print the checkpoints of a run's folder: step, tokens, size, age, layout of the save, and whether its manifest is whole."""
    from rich.console import Console
    from rich.table import Table

    from moe_train.training.console import count, duration

    folder = Path(run) / "checkpoints" if (Path(run) / "checkpoints").is_dir() else Path(run)
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{run} holds no checkpoints: give a run's folder")
    table = Table(box=None, header_style="bold")
    for name in ("checkpoint", "step", "tokens", "size", "age", "saved on", "state"):
        table.add_column(name, justify="left" if name in ("checkpoint", "saved on", "state") else "right")
    for path in found:
        try:
            entries = read_manifest(path)
            state = read_run_state(path)
        except DamagedError as error:
            table.add_row(path.name, "", "", "", "", "", f"damaged: {error}")
            continue
        size = sum(entry["bytes"] for entry in entries.values())
        age = duration(time.time() - path.stat().st_mtime)
        table.add_row(path.name, str(state["step"]), count(state["tokens"]), count(size) + "B", age, state.get("layout", ""), "verified" if is_verified(path) else "complete")
    Console().print(table)
    return 0


def verify(checkpoint: str | Path) -> int:
    """Check the hash of every file of a checkpoint, and that it covers every element of the model exactly once.

    Raises:
        DamagedError: with the file and the reason.
    """
    from moe_train.checkpoint.coverage import what_is_not_covered
    from moe_train.checkpoint.reader import read_metadata
    from moe_train.model.config import ModelConfig

    path = resolve_checkpoint(checkpoint)
    entries = read_manifest(path)
    if reason := check_files(path, entries):
        raise DamagedError(f"{path}: {reason}")
    model = ModelConfig.model_validate(read_run_state(path)["model"])
    if fault := what_is_not_covered(read_metadata(path), model):
        raise DamagedError(f"{path}: {fault}")
    if path.name.startswith("iter_"):
        mark_verified(path)
    print(f"{path}: {len(entries)} files are as written, {model.num_parameters():,} parameters are covered once")
    return 0
