"""A model's weights as global tensors, one at a time, without ranks: what converters read and write."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_train.checkpoint.folder import (
    FORMAT_VERSION,
    RUN_STATE,
    WRITING,
    check_free,
    read_run_state,
    resolve_checkpoint,
    tokenizer_in,
)
from moe_train.checkpoint.manifest import check_files, describe, flush, read_manifest, write_manifest
from moe_train.checkpoint.pieces import Piece
from moe_train.checkpoint.reader import read_metadata, read_pieces
from moe_train.checkpoint.writer import merge_plans, plan, write_metadata, write_pieces
from moe_train.errors import DamagedError, UserError, warn
from moe_train.model.config import ModelConfig

PREFIX = "weights."
_NOT_WRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EFBIG,
}
_PRECISIONS = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}  # of what computes with the weights; fp16 is not one


class WeightsReader:
    """Reads the weights of a checkpoint.

    Attributes:
        path: the checkpoint; ``state``: its run state; ``config``: its model's config; ``shapes``: global
            name -> shape.
    """

    def __init__(self, path: str | Path):
        self.path = resolve_checkpoint(path, warn)
        self.state = read_run_state(self.path)
        self.config = ModelConfig.model_validate(self.state["model"])
        self._metadata = read_metadata(self.path)
        stored = self._metadata.state_dict_metadata
        self.shapes = {key[len(PREFIX) :]: tuple(value.size) for key, value in stored.items() if key.startswith(PREFIX)}
        self._dtypes = {name: stored[PREFIX + name].properties.dtype for name in self.shapes}
        if set(self.shapes) != set(self.config.parameter_shapes()):
            odd = sorted(set(self.shapes) ^ set(self.config.parameter_shapes()))
            raise DamagedError(
                f"{self.path}: the weights are not those of its model's config: {odd[0]} and {len(odd) - 1} more"
            )

    @property
    def names(self) -> list[str]:
        """Every parameter, in the order of the model."""
        return list(self.config.parameter_shapes())

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that lies in the checkpoint, if one does."""
        return tokenizer_in(self.path)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    @property
    def optimizer_kinds(self) -> list[str]:
        """What is stored beside the weights: ``exp_avg``, ``exp_avg_sq``, and ``main`` of a run in bf16."""
        stored, first = self._metadata.state_dict_metadata, self.names[0]
        return [kind for kind in ("main", "exp_avg", "exp_avg_sq") if f"{kind}.{first}" in stored]

    def read(self, name: str, exact: bool = False) -> torch.Tensor:
        """One whole parameter, in the precision it was stored in; ``exact``: its fp32 main parameter where
        there is one."""
        main = exact and f"main.{name}" in self._metadata.state_dict_metadata
        return self.read_kind("main" if main else "weights", name)

    def read_kind(self, kind: str, name: str) -> torch.Tensor:
        """The whole of ``weights.NAME``, ``exp_avg.NAME``, ..., in the precision it was stored in."""
        shape, key = self.shapes[name], f"{kind}.{name}"
        tensor = torch.empty(shape, dtype=self._metadata.state_dict_metadata[key].properties.dtype)
        piece = Piece(key, shape, (0,) * len(shape), shape, tensor.dtype, lambda: tensor)
        read_pieces(self.path, [piece], self._metadata)
        return tensor


def write_weights(
    path: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    tokenizer: Path | None = None,
    extra_state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint of weights alone. ``tensors`` come in the order of ``config.parameter_shapes()``,
    one in memory at a time.

    ``dtype`` is that of all tensors, or of each by its name. The folder appears under its name once it is
    complete.

    Raises:
        UserError: ``path`` exists, or cannot be written.
    """
    shapes = config.parameter_shapes()
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    entries = [Entry(PREFIX + name, shape, dtypes[name]) for name, shape in shapes.items()]
    write_entries(path, config, entries, ((PREFIX + name, tensor) for name, tensor in tensors), tokenizer, extra_state)


class Entry(NamedTuple):
    """A global tensor of a checkpoint: its key (``weights.NAME``, ``exp_avg.NAME``, ...), shape and precision."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_entries(
    path: str | Path,
    config: ModelConfig,
    entries: list[Entry],
    tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer: Path | None = None,
    extra_state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint of these ``entries``; ``tensors`` come in their order, by key, one in memory at a time.

    Raises:
        UserError: ``path`` exists, or cannot be written.
    """
    target = check_free(path)
    writing = target.with_name(target.name + WRITING)
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        _write(writing, config, entries, iter(tensors), tokenizer, extra_state or {})
        if target.exists():
            target.rmdir()
        writing.rename(target)
        flush(target.parent)
    except BaseException as error:
        shutil.rmtree(writing, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:  # not what the source of the tensors may raise
            raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from None
        raise


def extract_weights(checkpoint: str | Path, out: str | Path, precision: str | None = None) -> int:
    """``moe-train checkpoint convert --weights``: the weights of a checkpoint alone, in ``precision`` (fp32
    or bf16; None: its own).

    In fp32 they are the main parameters of a run in bf16, where the checkpoint has them.

    Raises:
        UserError: there is no such checkpoint, or ``out`` exists.
    """
    reader = WeightsReader(checkpoint)
    if damage := check_files(reader.path, read_manifest(reader.path)):
        raise DamagedError(f"{reader.path}: {damage}")
    own = {name: reader.dtype(name) for name in reader.names}
    dtypes = (
        own
        if precision is None
        else dict.fromkeys(reader.names, {value: key for key, value in _PRECISIONS.items()}[precision])
    )
    kept = {key: reader.state[key] for key in ("step", "samples", "tokens") if key in reader.state}
    tensors = ((name, reader.read(name, exact=dtypes[name] == torch.float32)) for name in reader.names)
    write_weights(out, reader.config, tensors, dtypes, reader.tokenizer, kept)
    stored = precision or reader.state.get("precision", "their own precision")
    print(f"{out}: {reader.config.num_parameters():,} parameters in {stored}")
    return 0


def _write(
    folder: Path,
    config: ModelConfig,
    entries: list[Entry],
    tensors: Iterator[tuple[str, torch.Tensor]],
    tokenizer: Path | None,
    extra_state: dict[str, Any],
) -> None:
    """Write all files of the checkpoint into ``folder``."""
    pieces = [
        Piece(key, shape, (0,) * len(shape), shape, dtype, lambda entry=entry: _next(tensors, entry))
        for entry in entries
        for key, shape, dtype in [entry]
    ]
    written = write_pieces(folder, 0, pieces)
    files = written.entries | write_metadata(folder, merge_plans([plan(pieces)]), [written])
    state = {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "precision": _PRECISIONS.get(entries[0].dtype, "fp32"),
        "model": config.model_dump(mode="json"),
        **extra_state,
    }
    (folder / RUN_STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    files |= describe(folder, [file.name for file in folder.iterdir() if file.name not in files])
    write_manifest(folder, files)


def _next(tensors: Iterator[tuple[str, torch.Tensor]], entry: Entry) -> torch.Tensor:
    key, tensor = next(tensors)
    if key != entry.key or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"expected {entry.key} of shape {entry.shape}, got {key} of {tuple(tensor.shape)}")
    return tensor.to(entry.dtype)
