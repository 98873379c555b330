"""The folder of checkpoints: names, what is committed, which one is meant, which ones stay. Needs no torch."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from moe_train.checkpoint.config import CheckpointConfig
from moe_train.checkpoint.manifest import flush
from moe_train.errors import DamagedError, UserError

FORMAT_VERSION = 1
POINTER, RUN_STATE = "latest_checkpointed_iteration.txt", "run_state.json"
WRITING, REMOVING, DAMAGED = ".writing", ".removing", ".damaged"
"""Endings of folders that are no checkpoints: not finished, half removed, set aside."""


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("iter_" + "[0-9]" * 7) if path.is_dir())


def step_of(path: Path) -> int:
    """The step of an ``iter_*`` folder."""
    return int(path.name.removeprefix("iter_"))


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: an ``iter_*`` folder or a converted one itself, a run's folder its latest.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / RUN_STATE).exists():
        return path
    for folder in (path / "checkpoints", path):
        pointer = folder / POINTER
        if pointer.exists():
            latest = folder / f"iter_{int(pointer.read_text()):07d}"
            if (latest / RUN_STATE).exists():
                return latest
        if found := checkpoints(folder):
            return found[-1]
    raise UserError(f"{path} holds no checkpoint: give an iter_* folder, a run's folder, or what `checkpoint convert` wrote")


def read_run_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run beside its tensors.

    Raises:
        DamagedError: it is missing, unreadable or of a later format.
    """
    try:
        state = json.loads((path / RUN_STATE).read_text(encoding="utf-8"))
        version = state["format_version"]
    except FileNotFoundError:
        raise DamagedError(f"{path} is not a checkpoint: it has no {RUN_STATE}") from None
    except (ValueError, KeyError):
        raise DamagedError(f"{path / RUN_STATE} is unreadable") from None
    if version > FORMAT_VERSION:
        raise DamagedError(f"{path} has format {version}, this version reads up to {FORMAT_VERSION}: update moe-train")
    return state


def tokenizer_in(path: Path) -> Path | None:
    """The tokenizer that lies in a checkpoint, if one does."""
    found = sorted([*path.glob("*.model"), *path.glob("tokenizer.json")])
    return found[0] if found else None


def commit(target: Path, writing: Path) -> None:
    """Make the finished folder ``writing`` the checkpoint ``target`` and the newest one."""
    if target.exists():  # of a part of the run that was computed again
        remove(target)
    os.replace(writing, target)
    flush(target.parent)
    pointer = target.parent / POINTER
    temporary = pointer.with_suffix(".part")
    temporary.write_text(f"{step_of(target)}\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, pointer)
    flush(target.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint; half a removed one is never taken for a whole one."""
    doomed = path.with_name(path.name + REMOVING)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clean(folder: Path) -> None:
    """Remove what an earlier start left unfinished."""
    for ending in (WRITING, REMOVING):
        for left_over in folder.glob("iter_*" + ending):
            shutil.rmtree(left_over)


def remove_superseded(folder: Path, config: CheckpointConfig, keep: Path) -> None:
    """Remove all but ``keep``, the newest ``keep_last``, and one every ``keep_every``."""
    found = checkpoints(folder)
    forever = _kept_forever(found, config)
    for path in found[: -config.keep_last]:
        if path != keep and path not in forever:
            remove(path)


def _kept_forever(found: list[Path], config: CheckpointConfig) -> set[Path]:
    """The first checkpoint in each stretch of ``keep_every`` tokens or steps."""
    if config.keep_every is None:
        return set()
    first: dict[int, Path] = {}
    for path in found:
        try:
            state = read_run_state(path)
        except DamagedError:
            continue
        amount = state["step"] if config.keep_every.steps is not None else state["tokens"]
        first.setdefault(amount // config.keep_every.amount, path)
    return set(first.values())
