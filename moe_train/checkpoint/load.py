"""Loading: the newest checkpoint that is whole, into any layout."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.yaml_marks import as_yaml
from moe_train.checkpoint.folder import (
    DAMAGED,
    SUPERSEDED,
    checkpoints,
    clean,
    held_any,
    point_to,
    read_run_state,
    resolve_checkpoint,
    set_aside,
    step_of,
)
from moe_train.checkpoint.manifest import MANIFEST, UnreadableError, check_file, manifest_hash, read_manifest
from moe_train.checkpoint.pieces import pieces_of_scales, pieces_to_load
from moe_train.checkpoint.random_state import restore_random_state
from moe_train.checkpoint.reader import read_metadata, read_pieces
from moe_train.checkpoint.retention import mark_verified
from moe_train.errors import DamagedError, HardwareError, UserError, warn
from moe_train.model.config import ModelConfig

if TYPE_CHECKING:
    from moe_train.checkpoint.mirror import Mirror
    from moe_train.model.transformer import Transformer
    from moe_train.training.optimizer import Optimizer
    from parallel.topology import Topology

NOT_COMPARED = {"max_sequence_length", "init_std"}
"""Keys of a model's config on which no trained weight depends."""

COMPARED_OF_ROUTERS = {"renormalize", "bias", "normalize_logits", "logit_scale"}
"""Keys of a router that change what the model computes; the others only say how it is trained."""


def find_checkpoint(
    folder: Path, which: str = "auto", topology: Topology | None = None, mirror: Mirror | None = None
) -> Path | None:
    """The checkpoint to resume from: ``auto``, the newest in ``folder`` that is whole, or the one that the
    path ``which`` means.

    None where there never was one. All ranks check the hashes together, each file once. A checkpoint that is
    not whole is set aside (renamed to ``.damaged``) with the reason on the console, and the one before is
    taken. Where ``folder`` has none (its disk is gone), rank 0 fetches the newest whole copy from ``mirror``.

    Raises:
        DamagedError: none of the checkpoints is whole, or the one that was asked for is not.
        HardwareError: a rank does not see what rank 0 sees, or nobody can read it; nothing was set aside for that.
        UserError: ``which`` means none.
    """
    ranks = topology or _OneRank()
    first = ranks.rank == 0
    if which != "auto":
        return asked_for(which, ranks)
    if first:
        clean(folder)
    committed = ranks.from_rank_zero(checkpoints(folder) if first else None)
    _check_seen(folder, ranks)
    damaged = []
    for path in reversed(committed):
        reason = what_is_wrong(path, ranks)
        if reason is None:
            if first:
                _remember(path)
            return path
        damaged.append(f"{path.name}: {reason}")
        if first:
            warn(f"{path}: {reason}; set aside as {set_aside(path, DAMAGED).name}")
    if fetched := ranks.from_rank_zero(_fetch(mirror, folder) if first and mirror else None):
        if reason := what_is_wrong(fetched, ranks):
            raise DamagedError(f"{fetched}, just fetched from {mirror.url if mirror else 'its copy'}: {reason}")
        return fetched
    if damaged or ranks.from_rank_zero(held_any(folder) if first else None):
        what = "; ".join(damaged) or "those it had are set aside or gone"
        raise DamagedError(
            f"{folder} holds no checkpoint that is whole ({what}); restore one, or start a new run elsewhere"
        )
    return None


def give_up_later(folder: Path, path: Path, topology: Topology | None = None) -> None:
    """When every rank has loaded the checkpoint ``path``, from wherever, and the run in ``folder`` goes on from there:
    set aside (``.superseded``) those of ``folder`` that a later start would take for newer, and retention for those to
    keep. They are the later ones, and one of the same step that is not the same checkpoint."""
    ranks = topology or _OneRank()
    ranks.gather(None)  # a rank that could not load it ends the run with nothing set aside
    if ranks.rank > 0:
        return
    step = read_run_state(path)["step"]
    for each in checkpoints(folder):
        if step_of(each) > step or (step_of(each) == step and not _same(each, path)):
            aside = set_aside(each, SUPERSEDED)
            warn(f"{each} is of a part of the run that is given up; set aside as {aside.name}")
        elif each.samefile(path):
            _remember(each)


def _same(one: Path, other: Path) -> bool:
    try:
        return manifest_hash(one) == manifest_hash(other)
    except DamagedError:
        return False


def asked_for(which: str, topology: Topology | _OneRank | None = None) -> Path:
    """The checkpoint that the path ``which`` means to rank 0: on another node it might mean another one.

    Raises:
        DamagedError: it is not whole.
        HardwareError: a rank does not see what rank 0 sees.
        UserError: there is none.
    """
    ranks = topology or _OneRank()
    path = ranks.from_rank_zero(resolve_checkpoint(which) if ranks.rank == 0 else None)
    if reason := what_is_wrong(path, ranks):
        raise DamagedError(f"{path}: {reason}; give another checkpoint")
    return path


def what_is_wrong(path: Path, topology: Topology | _OneRank | None = None) -> str | None:
    """The first fault that any rank finds in the files of a checkpoint and rank 0 finds too, or None where no rank
    finds any.

    Raises:
        HardwareError: on all ranks, where rank 0 does not find what others do, or cannot read the file: that is of a
            node or the disk, and the checkpoint may be whole.
    """
    ranks = topology or _OneRank()
    found = ranks.gather(_first_fault(path, ranks.rank, ranks.layout.world_size))
    faults = [(rank, *fault) for rank, fault in enumerate(found) if fault]
    if not faults:
        return None
    reason = ranks.from_rank_zero(_confirmed(path, [name for _, _, name, _ in faults]) if ranks.rank == 0 else None)
    if reason is None:
        rank, host, _, theirs = faults[0]
        others = f" (and {len(faults) - 1} other ranks, each in its part)" * (len(faults) > 1)
        raise HardwareError(
            f"{path}: rank {rank} on {host}{others}: {theirs}; rank 0 does not find it damaged. Nothing was set aside: "
            "see to the disk as that host sees it, and start again"
        )
    return reason


def _first_fault(path: Path, rank: int, world_size: int) -> tuple[str, str, str] | None:
    """Of the files that are for ``rank`` to check: (its host, the faulty file, what is wrong with it)."""
    host, name = socket.gethostname(), MANIFEST
    try:
        entries = sorted(read_manifest(path).items(), key=lambda entry: (-entry[1]["bytes"], entry[0]))
        for name, entry in entries[rank::world_size]:  # noqa: B007
            if reason := check_file(path / name, entry):
                return host, name, reason
    except DamagedError as error:
        return host, name, str(error)
    return None


def _confirmed(path: Path, names: list[str]) -> str | None:
    """The first fault of the files ``names`` that this rank, which can read them, finds too."""
    for name in dict.fromkeys(names):
        try:
            entries = read_manifest(path)
            if name in entries and (reason := check_file(path / name, entries[name])):
                return reason
        except UnreadableError:
            continue
        except DamagedError as error:
            return str(error)
    return None


def _check_seen(folder: Path, ranks: Topology | _OneRank) -> None:
    """Raise HardwareError where another rank sees checkpoints and rank 0 none: it would start from nothing."""
    seen = ranks.gather((held_any(folder), socket.gethostname()))
    if not seen[0][0] and any(held for held, _ in seen):
        rank = next(rank for rank, (held, _) in enumerate(seen) if held)
        raise HardwareError(
            f"{folder}: rank {rank} on {seen[rank][1]} sees checkpoints there, rank 0 on {seen[0][1]} none: see to "
            "that host's view of the disk and start again"
        )


def load_checkpoint(
    path: Path,
    chunks: list[Transformer],
    optimizer: Optimizer | None,
    topology: Topology | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fill model and optimizer (unless None) from a checkpoint of any layout; returns its run state.

    Each rank reads the rectangles it needs, and no rank asks another. Weights are cast where the checkpoint
    has another precision. Parameters whose names end like one of ``without`` stay as they are.

    Raises:
        UserError: an optimizer is to be filled and the checkpoint holds weights alone.
        DamagedError: something is missing or has another shape.
    """
    state, metadata = read_run_state(path), read_metadata(path)
    kinds = {key.partition(".")[0] for key in metadata.state_dict_metadata}
    if optimizer is not None and not ({"exp_avg", "exp_avg_sq"} <= kinds and "optimizer_steps" in state):
        raise UserError(
            f"{path} holds weights alone: a new run can start from it (checkpoint.initialize_from), none go on with it"
        )
    pieces = pieces_to_load(chunks, optimizer, with_main="main" in kinds)
    if optimizer is not None:
        stored = metadata.state_dict_metadata
        pieces += [piece for piece in pieces_of_scales(chunks, to_save=False) if piece.key in stored]
    read_pieces(path, [piece for piece in pieces if not piece.key.endswith(without)], metadata)
    if optimizer is not None:
        optimizer.set_steps_taken(state["optimizer_steps"])
        restore_random_state(state.get("random"))
    return state


def initialize_from(which: str, chunks: list[Transformer], config: ModelConfig, topology: Topology) -> None:
    """Fill the weights of a new run from the checkpoint that the path ``which`` means. The gates of layers
    (``model.depth``) begin anew where its model has none: this is how a trained model becomes a mixture of depths.

    Raises:
        UserError: there is none, or it is another model.
        DamagedError: it is not whole, or something has another shape.
        HardwareError: a rank does not see what rank 0 sees.
    """
    path = asked_for(which, topology)
    state = read_run_state(path)
    gated = ModelConfig.model_validate(state["model"]).depth is not None
    check_same_model(state, config if gated else config.model_copy(update={"depth": None}))
    load_checkpoint(path, chunks, None, topology, without=() if gated else (".depth_gate.weight",))


def check_same_model(state: dict[str, Any], config: ModelConfig) -> None:
    """Raise UserError, naming the keys and both values, unless the checkpoint's model has the shape of
    ``config``."""
    saved = ModelConfig.model_validate(state["model"])  # an older one lacks keys that have their defaults since
    theirs, ours = _flat(_what_is_computed(saved)), _flat(_what_is_computed(config))
    differing = [
        f"model.{key} is {as_yaml(theirs.get(key))} in the checkpoint, {as_yaml(ours.get(key))} in the config"
        for key in dict.fromkeys([*theirs, *ours])
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise UserError(
            f"a checkpoint of another model: {'; '.join(differing)}; restore these keys, or start a new run elsewhere"
        )


class _OneRank:
    """What a topology answers in a process that is alone."""

    rank = 0

    class layout:  # noqa: N801
        world_size = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_rank_zero(self, value: Any) -> Any:
        return value


def _fetch(mirror: Mirror, folder: Path) -> Path | None:
    fetched = mirror.fetch(folder)
    if fetched is not None:
        warn(f"{folder} holds no whole checkpoint; {fetched.name} was fetched from {mirror.url}")
    return fetched


def _remember(path: Path) -> None:
    """Note what was found out: the checkpoint is whole, and the newest one that counts."""
    mark_verified(path)
    try:
        point_to(path)
    except OSError:
        pass  # a folder that can only be read can still be loaded from


def _what_is_computed(config: ModelConfig) -> dict[str, Any]:
    """The config without what does not change the model's output; every mixture with the router that it has."""
    data = config.model_dump(mode="json", exclude={"router", *NOT_COMPARED, "depth"})
    data["depth"] = config.depth.model_dump(exclude={"coef"}) if config.depth else {}
    for part in ("attention", "mlp"):
        if "router" in data[part]:
            data[part]["router"] = config.router_of(part).model_dump(include=COMPARED_OF_ROUTERS)
    return data


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
