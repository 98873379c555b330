"""Pieces into the files of torch.distributed.checkpoint, hashed as the bytes pass.

What is used of that library is its metadata and file format, not its driver: the driver asks the other ranks
at every turn, which must not happen beside the collectives of the training that goes on meanwhile. Its own
loader reads what is written here."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from moe_train.checkpoint.pieces import Piece
from moe_train.checkpoint.reader import METADATA

_FORMAT = "1.0.0"  # torch's name of its format, which its loader does not look at


@dataclass(frozen=True)
class Written:
    """What one rank wrote: where each piece lies, and ``{file: {"bytes", "xxh3_128"}}`` for the manifest."""

    places: dict[MetadataIndex, _StorageInfo]
    entries: dict[str, dict]


def plan(pieces: Iterable[Piece]) -> SavePlan:
    """What one rank is going to write, to be told to the others."""
    return SavePlan([_write_item(piece) for piece in pieces])


def merge_plans(plans: list[SavePlan]) -> Metadata:
    """The metadata of a checkpoint of which each rank writes its plan; where the pieces lie is not known
    yet."""
    _, metadata = create_default_global_save_plan(plans, rewrite_index_hints=False)
    return metadata


def write_pieces(folder: Path, rank: int, pieces: Iterable[Piece]) -> Written:
    """Write one rank's file and flush it to the disk. One piece at a time is in memory besides what the
    pieces hold.

    Raises:
        OSError: the disk is full, the folder is gone or cannot be written.
    """
    name = f"__{rank}_0{DEFAULT_SUFFIX}"
    places = {}
    with _HashingFile(folder / name) as file:
        for piece in pieces:
            tensor = _on_its_own(piece.tensor().detach().cpu().contiguous())
            begin = file.tell()
            file.save(tensor)
            places[_index(piece)] = _StorageInfo(name, begin, file.tell() - begin)
        file.flush_to_disk()
    return Written(places, {name: file.entry()})


def write_metadata(folder: Path, metadata: Metadata, written: Iterable[Written]) -> dict[str, dict]:
    """Write the metadata, the index of all ranks' files; returns its entry for the manifest."""
    metadata.storage_data = {index: place for each in written for index, place in each.places.items()}
    metadata.planner_data = {key: (key,) for key in metadata.state_dict_metadata}  # torch's own tools ask for it
    metadata.version = _FORMAT
    with _HashingFile(folder / METADATA) as file:
        file.write(pickle.dumps(metadata, protocol=4))
        file.flush_to_disk()
    return {METADATA: file.entry()}


class _HashingFile(io.RawIOBase):
    """An unbuffered file: what was written is what was hashed, and what a flush to the disk flushes."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._size, self._digest = 0, xxhash.xxh3_128()
        self._error: OSError | None = None

    def save(self, tensor: torch.Tensor) -> None:
        """Append a tensor as torch.save stores it."""
        # The archive around a tensor would get a checksum that nothing reads and that costs as much as the write
        # itself; ours is in the manifest. The option is the thread's own.
        checked = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(tensor, self)
        except Exception:
            if self._error is not None:  # torch says that writing failed, not why
                raise self._error from None
            raise
        finally:
            torch.serialization.set_crc32_options(checked)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._size += len(view)
        written = 0
        try:
            while written < len(view):  # a disk that fills up takes a part first
                written += os.write(self._file, view[written:])
        except OSError as error:
            self._error = error
            raise
        return written

    def entry(self) -> dict:
        """Size and hash, as the manifest has them."""
        return {"bytes": self._size, "xxh3_128": self._digest.hexdigest()}

    def flush_to_disk(self) -> None:
        os.fsync(self._file)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


def _on_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: torch.save stores a view with all that it is a view of."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes or tensor.numel() == 0:
        return tensor
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return torch.frombuffer(flat, dtype=tensor.dtype).view(tensor.shape)


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, torch.Size(piece.offset))


def _write_item(piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.global_shape))
    return WriteItem(_index(piece), WriteItemType.SHARD, tensor_data=data)
