"""Loading: the newest checkpoint that is whole, into any layout."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train.checkpoint.folder import DAMAGED, POINTER, checkpoints, read_run_state
from moe_train.checkpoint.manifest import check_files, read_manifest
from moe_train.checkpoint.pieces import pieces_to_load
from moe_train.checkpoint.storage import read_metadata, read_pieces
from moe_train.errors import DamagedError, UserError
from moe_train.model.config import ModelConfig
from moe_train.model.jetmoe import JetMoE
from moe_train.training.optimizer import Optimizer
from parallel.topology import Topology

NOT_COMPARED = {"router", "max_sequence_length"}
"""Parts of a model's config on which no weight depends."""


def find_checkpoint(folder: Path, which: str, topology: Topology) -> Path | None:
    """The checkpoint to resume from: ``auto``, the newest in ``folder`` that is whole, or the one at the path ``which``.

    None where there never was one. All ranks check the hashes together, each file once. A checkpoint that is not whole is
    set aside (renamed to ``.damaged``) with the reason on the console, and the one before is taken.

    Raises:
        DamagedError: none of the checkpoints is whole, or the one that was asked for is not.
    """
    if which != "auto":
        path = Path(which)
        if reason := what_is_wrong(path, topology):
            raise DamagedError(f"{path}: {reason}; give another checkpoint, or --resume auto")
        return path
    found = topology.from_rank_zero(checkpoints(folder) if topology.rank == 0 else None)
    damaged = []
    for path in reversed(found):
        reason = what_is_wrong(path, topology)
        if reason is None:
            return path
        damaged.append(f"{path.name}: {reason}")
        if topology.rank == 0:
            aside = path.with_name(path.name + DAMAGED)
            print(f"warning: {path}: {reason}; set aside as {aside.name}", flush=True)
            path.rename(aside)
    if damaged or topology.from_rank_zero((folder / POINTER).exists()):
        raise DamagedError(f"{folder} holds no checkpoint that is whole ({'; '.join(damaged) or 'all are gone'}); restore one, or start a new run")
    return None


def what_is_wrong(path: Path, topology: Topology) -> str | None:
    """The first fault that any rank finds in the files of a checkpoint, or None."""
    try:
        entries = sorted(read_manifest(path).items())
        mine = dict(entries[topology.rank :: topology.layout.world_size])
        reason = check_files(path, mine)
    except DamagedError as error:
        reason = str(error)
    return next((found for found in topology.gather(reason) if found), None)


def load_checkpoint(
    path: Path, chunks: list[JetMoE], optimizer: Optimizer | None, topology: Topology | None = None
) -> dict[str, Any]:
    """Fill model and optimizer (unless None) from a checkpoint of any layout; returns its run state.

    Each rank reads the rectangles it needs. Weights are cast where the checkpoint has another precision.
    """
    state = read_run_state(path)
    with_main = any(key.startswith("main.") for key in read_metadata(path).state_dict_metadata)
    read_pieces(path, pieces_to_load(chunks, optimizer, with_main))
    if optimizer is not None:
        optimizer.set_steps_taken(state["optimizer_steps"])
    return state


def check_same_model(state: dict[str, Any], config: ModelConfig) -> None:
    """Raise UserError, naming the keys and both values, unless the checkpoint's model has the shape of ``config``."""
    theirs, ours = _flat(state["model"]), _flat(config.model_dump(mode="json"))
    differing = [
        f"model.{key} is {theirs.get(key)} in the checkpoint, {ours.get(key)} in the config"
        for key in dict.fromkeys([*theirs, *ours])
        if key.split(".")[0] not in NOT_COMPARED and theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise UserError(f"a checkpoint of another model: {'; '.join(differing)}; restore these keys, or start a new run elsewhere")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
