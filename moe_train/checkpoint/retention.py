"""Which checkpoints stay. Needs no torch."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

from moe_train.checkpoint.config import CheckpointConfig


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("iter_" + "[0-9]" * 7) if path.is_dir())


def remove_superseded(folder: Path, config: CheckpointConfig, keep: Path) -> None:
    """Remove all but ``keep``, the newest ``keep_last``, and one every ``keep_every``."""
    found = checkpoints(folder)
    forever = _kept_forever(found, config)
    for path in found[: -config.keep_last]:
        if path != keep and path not in forever:
            doomed = path.with_name(path.name + ".removing")  # half a removed checkpoint is never taken for a whole one
            path.rename(doomed)
            shutil.rmtree(doomed)


def _kept_forever(found: list[Path], config: CheckpointConfig) -> set[Path]:
    """The first checkpoint in each stretch of ``keep_every`` tokens or steps."""
    if config.keep_every is None:
        return set()
    first: dict[int, Path] = {}
    for path in found:
        try:
            state = json.loads((path / "run_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        amount = state["step"] if config.keep_every.steps is not None else state["tokens"]
        first.setdefault(amount // config.keep_every.amount, path)
    return set(first.values())
