"""Pieces in the files of torch.distributed.checkpoint: the planners that tell it what to write and read."""
from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_train.checkpoint.pieces import Piece
from moe_train.errors import DamagedError

# Reading without ranks is what a converter does.
warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")


class PieceSaver(SavePlanner):
    """Writes the pieces of one rank. The plans of all ranks together make the metadata, on one of them."""

    def __init__(self, pieces: list[Piece]):
        self._pieces = {_index(piece): piece for piece in pieces}

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        """Nothing: the pieces are known."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(index, piece) for index, piece in self._pieces.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._pieces[write_item.index].tensor()


class PieceLoader(LoadPlanner):
    """Reads the pieces of one rank, from whichever rectangles the checkpoint was written in, casting to their precision."""

    def __init__(self, pieces: list[Piece]):
        # Two pieces may want the same rectangle: weights and main parameters, when the checkpoint has one for both.
        self._pieces = {str(number): piece for number, piece in enumerate(pieces)}

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for number, piece in self._pieces.items():
            stored = self._metadata.state_dict_metadata.get(piece.key)
            if stored is None:
                raise DamagedError(f"the checkpoint has no {piece.key}")
            if tuple(stored.size) != piece.global_shape:
                raise DamagedError(f"{piece.key} has the shape {tuple(stored.size)} in the checkpoint, {piece.global_shape} here")
            chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
            found = create_read_items_for_chunk_list(piece.key, stored, [chunk])
            if sum(item.lengths.numel() for item in found) != chunk.sizes.numel():
                raise DamagedError(f"{piece.key} is not covered whole by the checkpoint")
            items += [replace(item, dest_index=MetadataIndex(number)) for item in found]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise DamagedError(f"{read_item.storage_index.fqn} is not a tensor in the checkpoint")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._pieces[read_item.dest_index.fqn].tensor()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: it was read into the piece itself."""


def read_pieces(folder: Path, pieces: list[Piece]) -> None:
    """Fill ``pieces`` from the checkpoint ``folder``. Asks nothing of other ranks."""
    torch.distributed.checkpoint.load(
        {}, storage_reader=FileSystemReader(folder), planner=PieceLoader(pieces), no_dist=True
    )


def read_metadata(folder: Path) -> Metadata:
    """Which rectangles of which tensors the checkpoint holds, and where."""
    return FileSystemReader(folder).read_metadata()


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, torch.Size(piece.offset))


def _write_item(index: MetadataIndex, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.global_shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)
