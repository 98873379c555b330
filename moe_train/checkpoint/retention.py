"""Which checkpoints stay: the newest few, one each so often for good, and always the last one known to be
whole. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from moe_train.checkpoint.config import CheckpointConfig
from moe_train.checkpoint.folder import checkpoints, read_run_state, remove
from moe_train.checkpoint.manifest import flush, manifest_hash
from moe_train.errors import DamagedError, UserError

VERIFIED = "verified.json"
"""Beside the checkpoints: which of them had all their hashes checked after they were written, by the hash of
their manifest."""


def mark_verified(path: Path) -> None:
    """Remember that every file of a checkpoint was read and is as it was written."""
    known = _verified(path.parent)
    known[path.name] = manifest_hash(path)
    known = {name: value for name, value in known.items() if (path.parent / name).exists()}
    temporary = path.parent / (VERIFIED + ".part")
    try:
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path.parent / VERIFIED)
    except OSError:
        pass  # a folder that can only be read is not written to: it loses no checkpoint either


def is_verified(path: Path) -> bool:
    """Whether :func:`mark_verified` was told so of this very checkpoint."""
    try:
        return _verified(path.parent).get(path.name) == manifest_hash(path)
    except DamagedError:
        return False


def superseded(folder: Path, config: CheckpointConfig) -> list[Path]:
    """The checkpoints that may go, oldest first."""
    found = checkpoints(folder)
    stay = set(found[-config.keep_last :]) | _for_good(found, config)
    stay.update([path for path in found if is_verified(path)][-1:])
    return [path for path in found if path not in stay]


def remove_superseded(folder: Path, config: CheckpointConfig, in_use: Collection[Path] = ()) -> list[Path]:
    """Remove what may go, but what is ``in_use``; returns what it was."""
    gone = [path for path in superseded(folder, config) if path not in in_use]
    for path in gone:
        remove(path)
    return gone


def _for_good(found: list[Path], config: CheckpointConfig) -> set[Path]:
    """The first checkpoint at or after each multiple of ``keep_every`` tokens or steps."""
    if config.keep_every is None:
        return set()
    first: dict[int, Path] = {}
    for path in found:
        try:
            state = read_run_state(path)
            amount = state["step"] if config.keep_every.steps is not None else state["tokens"]
        except (DamagedError, UserError, KeyError):
            continue
        if number := amount // config.keep_every.amount:
            first.setdefault(number, path)
    return set(first.values())


def _verified(folder: Path) -> dict[str, str]:
    try:
        known = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
