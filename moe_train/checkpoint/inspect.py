"""``moe-train checkpoint list`` and ``verify``."""
from __future__ import annotations

import math
import time
from pathlib import Path

from moe_train.checkpoint.folder import checkpoints, read_run_state, resolve_checkpoint
from moe_train.checkpoint.manifest import check_files, read_manifest
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
        table.add_row(path.name, str(state["step"]), count(state["tokens"]), count(size) + "B", age, state.get("layout", ""), "complete")
    Console().print(table)
    return 0


def verify(checkpoint: str | Path) -> int:
    """Check the hash of every file of a checkpoint, and that it covers every element of the model exactly once.

    Raises:
        DamagedError: with the file and the reason.
    """
    path = resolve_checkpoint(checkpoint)
    entries = read_manifest(path)
    if reason := check_files(path, entries):
        raise DamagedError(f"{path}: {reason}")
    elements = _check_coverage(path)
    print(f"{path}: {len(entries)} files are as written, {elements:,} parameters are covered once")
    return 0


def _check_coverage(path: Path) -> int:
    """The elements of the model, after checking that the rectangles of each tensor tile it."""
    from moe_train.checkpoint.storage import read_metadata
    from moe_train.model.config import ModelConfig

    state = read_run_state(path)
    shapes = ModelConfig.model_validate(state["model"]).parameter_shapes()
    stored = read_metadata(path).state_dict_metadata
    missing = [name for name in shapes if f"weights.{name}" not in stored]
    if missing:
        raise DamagedError(f"{path}: weights.{missing[0]} is missing")
    for key, tensor in stored.items():
        name = key.split(".", 1)[1]
        if name not in shapes or tuple(tensor.size) != tuple(shapes[name]):
            raise DamagedError(f"{path}: {key} does not belong to the model of run_state.json")
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
        covered = sum(math.prod(sizes) for _, sizes in chunks)
        if covered != math.prod(tensor.size) or any(_overlap(a, b) for i, a in enumerate(chunks) for b in chunks[:i]):
            raise DamagedError(f"{path}: the pieces of {key} do not cover it exactly once")
    return sum(math.prod(shape) for shape in shapes.values())


def _overlap(a, b) -> bool:
    """Whether two rectangles, each (offset, extent), share an element."""
    return all(x < y + m and y < x + n for x, n, y, m in zip(a[0], a[1], b[0], b[1]))
