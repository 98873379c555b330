"""The folder of checkpoints: names, what is committed, which one is meant. Needs no torch.

A checkpoint is a folder ``iter_0000100`` whose manifest is whole. Whatever else lies beside has an ending: it
is being written, being removed, or was set aside."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.target import check_target
from moe_train.checkpoint.manifest import MANIFEST, MANIFEST_HASH, flush, is_complete
from moe_train.errors import DamagedError, UserError

FORMAT_VERSION = 1
POINTER, RUN_STATE = "latest_checkpointed_iteration.txt", "run_state.json"
WRITING, REMOVING = ".writing", ".removing"
"""Endings of folders that the next start removes: not finished, half removed."""
DAMAGED, SUPERSEDED = ".damaged", ".superseded"
"""Endings of folders that were set aside for people to look at: not whole, or of a part of the run that was
given up."""

_NAME = re.compile(r"iter_(\d{7,})")


def checkpoint_name(step: int) -> str:
    """``iter_0000100`` for step 100."""
    return f"iter_{step:07d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of that name is a checkpoint of a run, not one that was set aside or not finished."""
    return _NAME.fullmatch(name) is not None


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(
        (path for path in folder.glob("iter_*") if is_checkpoint_name(path.name) and path.is_dir()),
        key=step_of,
    )


def held_any(folder: Path) -> bool:
    """Whether the run ever committed a checkpoint, as far as the folder tells."""
    return (folder / POINTER).exists() or any(
        _NAME.match(path.name) and not path.name.partition(".")[2].startswith(WRITING[1:])
        for path in folder.glob("iter_*")
    )


def step_of(path: Path) -> int:
    """The step of an ``iter_*`` folder."""
    return int(path.name.removeprefix("iter_"))


def resolve_checkpoint(path: str | Path, tell: Callable[[str], None] | None = None) -> Path:
    """The checkpoint that ``path`` means: an ``iter_*`` folder or a converted one itself, a run's folder its
    newest complete one, ``RUN_DIR@STEP`` the one of that step.

    Args:
        tell: called with a line where a newer one was passed over because it is not complete.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if any((path / name).exists() for name in (RUN_STATE, MANIFEST, MANIFEST_HASH)):  # one of them may be what was lost
        return path
    at = re.fullmatch(r"(.+)@(\d+)", str(path))
    run, step = (Path(at[1]), int(at[2])) if at and not path.exists() else (path, None)
    for folder in (run / "checkpoints", run):
        found = [each for each in checkpoints(folder) if step is None or step_of(each) == step]
        for each in reversed(found):
            if is_complete(each):
                if tell and each != found[-1]:
                    tell(f"{found[-1]} is not complete; {each.name} is taken")
                return each
        if found:  # what is wrong with it is for the reader to say
            return found[-1]
    if step is not None:
        there = [step_of(each) for folder in (run / "checkpoints", run) for each in checkpoints(folder)]
        raise UserError(f"{run} has no checkpoint of step {step}; it has {there or 'none'}")
    raise UserError(
        f"{path} holds no checkpoint: give an iter_* folder, a run's folder, or what `checkpoint convert` wrote"
    )


def read_run_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run beside its tensors.

    Raises:
        DamagedError: it is missing or unreadable.
        UserError: it is of a later format.
    """
    try:
        state = json.loads((path / RUN_STATE).read_text(encoding="utf-8"))
        version = int(state["format_version"])
    except FileNotFoundError:
        raise DamagedError(f"{path} is not a checkpoint: it has no {RUN_STATE}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedError(f"{path / RUN_STATE} is unreadable") from None
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this version reads up to {FORMAT_VERSION}: update moe-train")
    return state


def tokenizer_in(path: Path) -> Path | None:
    """The tokenizer that lies in a checkpoint, if one does."""
    found = sorted([*path.glob("*.model"), *path.glob("tokenizer.json")])
    return found[0] if found else None


def check_free(path: str | Path) -> Path:
    """``path`` without links: a new folder, or an empty one that a finished one can take the place of.

    Raises an error with ``exit_code`` 2, one line, for anything else.
    """
    target = check_target(path, "the target", folder=True).resolve()
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{path} exists already: choose another folder")
    if target.is_mount() or target == Path.cwd():
        raise UserError(f"{path} is in use, and cannot be replaced by the finished folder: name a new one in it")
    return target


def commit(target: Path, writing: Path) -> None:
    """Make the finished folder ``writing`` the checkpoint ``target`` and the newest one."""
    if target.exists():  # of a part of the run that was computed again
        remove(target)
    os.rename(writing, target)
    flush(target.parent)
    try:
        point_to(target)
    except OSError:
        pass  # a disk that is full by now: it is a checkpoint all the same, and the next one is pointed to


def point_to(target: Path) -> None:
    """Name ``target`` in the file that other programs look at. Ours go by the folders themselves."""
    pointer = target.parent / POINTER
    temporary = pointer.with_suffix(".part")
    temporary.write_text(f"{step_of(target)}\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, pointer)
    flush(target.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint; half a removed one is never taken for a whole one."""
    doomed = _free(path, REMOVING)
    path.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path, ending: str) -> Path:
    """Rename a checkpoint so that it is none any more; returns its new path, which is its own where it cannot
    be renamed."""
    aside = _free(path, ending)
    try:
        path.rename(aside)
    except OSError:
        return path
    return aside


def clean(folder: Path) -> list[Path]:
    """Remove what an earlier start left unfinished; returns what could not be removed."""
    left = [path for path in folder.glob("iter_*") if _is_left_over(path.name)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in left if path.exists()]


def _is_left_over(name: str) -> bool:
    _, _, ending = name.partition(".")
    return f".{ending}".startswith((WRITING, REMOVING))


def _free(path: Path, ending: str) -> Path:
    """``path`` with an ending under which nothing lies yet."""
    for number in range(1, 1000):
        candidate = path.with_name(f"{path.name}{ending}{'' if number == 1 else number}")
        if not candidate.exists():
            return candidate
    raise FileExistsError(f"{path}{ending}: too many of them")
