"""``moe-train checkpoint list`` and ``verify``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from moe_train.checkpoint.folder import checkpoints, read_run_state, resolve_checkpoint
from moe_train.checkpoint.manifest import check_files, read_manifest
from moe_train.checkpoint.retention import is_verified, mark_verified
from moe_train.errors import DamagedError, UserError, warn


def list_checkpoints(run: str | Path, as_json: bool = False) -> int:
    """Print the checkpoints of a run's folder: step, tokens, size, age, layout of the save, and how far it is
    known to be whole.

    Looks at sizes, not at contents: ``damaged`` is certain, ``complete`` has every file in its size,
    ``verified`` had its hashes checked."""
    found = [_describe(path) for path in checkpoints(_checkpoints_of(run))]
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    from moe_train.training.console import count, duration

    table = Table(box=None, header_style="bold")
    for name in ("checkpoint", "step", "tokens", "size", "age", "saved on", "state"):
        table.add_column(name, justify="left" if name in ("checkpoint", "saved on", "state") else "right")
    for each in found:
        state = each["state"] + (f": {each['fault']}" if each["fault"] else "")
        if each["step"] is None:
            table.add_row(each["checkpoint"], "", "", "", "", "", state)
        else:
            figures = (
                str(each["step"]),
                count(each["tokens"]),
                count(each["bytes"]) + "B",
                duration(each["age_seconds"]),
            )
            table.add_row(each["checkpoint"], *figures, each["layout"], state)
    Console().print(table)
    return 0


def verify(checkpoint: str | Path, every: bool = False) -> int:
    """Check the hash of every file of a checkpoint, and that it covers every element of the model exactly
    once.

    With ``every`` all checkpoints of a run's folder are checked, to the last one; of those that go meanwhile, as in a
    run that is on, it is said.

    Raises:
        DamagedError: with each checkpoint's first file that is not as it was written, and why.
    """
    if not every:
        print(_verify(resolve_checkpoint(checkpoint, warn)))
        return 0
    faults = []
    for path in checkpoints(_checkpoints_of(checkpoint)):
        try:
            print(_verify(path))
        except DamagedError as error:
            if not path.exists():
                print(f"{path} was removed meanwhile")
                continue
            faults.append(str(error))
            print(f"damaged: {error}")
    if faults:
        raise DamagedError("; ".join(faults))
    return 0


def _verify(path: Path) -> str:
    from moe_train.checkpoint.coverage import what_is_not_covered
    from moe_train.checkpoint.reader import read_metadata
    from moe_train.model.config import ModelConfig

    entries = read_manifest(path)
    if reason := check_files(path, entries):
        raise DamagedError(f"{path}: {reason}")
    model = ModelConfig.model_validate(read_run_state(path)["model"])
    if fault := what_is_not_covered(read_metadata(path), model):
        raise DamagedError(f"{path}: {fault}")
    if path.name.startswith("iter_"):
        mark_verified(path)
    return f"{path}: {len(entries)} files are as written, {model.num_parameters():,} parameters are covered once"


def _describe(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = dict.fromkeys(("step", "tokens", "bytes", "age_seconds", "layout", "fault"))
    known = {"checkpoint": path.name, **known, "state": "damaged"}
    try:
        entries, state = read_manifest(path), read_run_state(path)
        if fault := check_files(path, entries, hashes=False):
            raise DamagedError(fault)
    except (DamagedError, UserError) as error:
        return {**known, "fault": str(error)}
    return {
        **known,
        "step": state["step"],
        "tokens": state["tokens"],
        "bytes": sum(entry["bytes"] for entry in entries.values()),
        "age_seconds": round(time.time() - path.stat().st_mtime),
        "layout": state.get("layout", ""),
        "state": "verified" if is_verified(path) else "complete",
    }


def _checkpoints_of(run: str | Path) -> Path:
    """The folder of checkpoints of a run, which is given by itself or by its run's folder."""
    for folder in (Path(run) / "checkpoints", Path(run)):
        if checkpoints(folder):
            return folder
    aside = ", ".join(sorted(path.name for path in Path(run, "checkpoints").glob("iter_*.*")))
    raise UserError(f"{run} holds no checkpoints" + (f"; set aside are {aside}" if aside else ": give a run's folder"))
