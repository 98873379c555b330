"""Pieces out of the files of torch.distributed.checkpoint: of each stored rectangle, only the part that is
asked for is read."""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from dataclasses import replace
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from moe_train.checkpoint.pieces import Piece
from moe_train.errors import DamagedError

METADATA = ".metadata"


def read_metadata(folder: Path) -> Metadata:
    """Which rectangles of which tensors the checkpoint holds, and where.

    Raises:
        DamagedError: the file is missing or holds something else.
    """
    path = Path(folder) / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except Exception as error:  # a damaged pickle fails in any way there is
        raise DamagedError(f"{path} is unreadable ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise DamagedError(f"{path} is not the metadata of a checkpoint")
    return metadata


def read_pieces(folder: Path, pieces: list[Piece], metadata: Metadata | None = None) -> None:
    """Fill ``pieces`` from the checkpoint ``folder``, from whichever rectangles it was written in. Asks
    nothing of other ranks.

    Raises:
        DamagedError: a piece is not there, has another shape, or a file ends too early.
    """
    metadata = metadata or read_metadata(folder)
    reader, planner = SpanReader(folder), PieceLoader(pieces)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner.set_up_planner({}, metadata)
    reader.read_data(planner.create_local_plan(), planner)


class PieceLoader(LoadPlanner):
    """What one rank reads, cast to the precision of its pieces."""

    def __init__(self, pieces: list[Piece]):
        # Two pieces may want the same rectangle: weights and main parameters, when the checkpoint has one for
        # both.
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
                raise DamagedError(
                    f"{piece.key} has the shape {tuple(stored.size)} in the checkpoint, {piece.global_shape} here"
                )
            chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
            found = create_read_items_for_chunk_list(piece.key, stored, [chunk])
            if sum(item.lengths.numel() for item in found) != chunk.sizes.numel():
                raise DamagedError(f"{piece.key} is not covered once by the checkpoint")
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


class SpanReader(FileSystemReader):
    """Reads of each stored tensor the bytes between the first and the last that are wanted; torch's own reads
    it whole, so that many ranks that each want a part of a large tensor would read it many times over."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[int, ReadItem]]] = {}
        for item in plan.items:
            where = self.storage_data[item.storage_index]
            by_file.setdefault(where.relative_path, []).append((where.offset, item))
        for name, items in by_file.items():
            path = Path(self.path) / name
            with _open(path) as file:
                begin: dict[int, int] = {}  # of an archive -> of the tensor's bytes in it
                for offset, item in sorted(items, key=lambda pair: pair[0]):
                    if offset not in begin:
                        begin[offset] = offset + _data_offset(
                            path, file.fileno(), self.storage_data[item.storage_index]
                        )
                    self._read(path, file.fileno(), begin[offset], item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def _read(self, path: Path, file: int, begin: int, item: ReadItem, planner: LoadPlanner) -> None:
        stored = self._tensors[item.storage_index.fqn]
        shape = stored.chunks[item.storage_index.index].sizes
        target = planner.resolve_tensor(item).detach()
        try:
            read_rectangle(file, begin, tuple(shape), tuple(item.storage_offsets), stored.properties.dtype, target)
        except (EOFError, OSError) as error:
            raise DamagedError(f"{path}: {item.storage_index.fqn} cannot be read ({error})") from None
        planner.commit_tensor(item, target)


def read_rectangle(
    file: int,
    begin: int,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    dtype: torch.dtype,
    target: torch.Tensor,
) -> None:
    """Fill ``target`` with the rectangle of its shape at ``offset`` of a row-major tensor that lies in an
    open file from byte ``begin``.

    Where most of the bytes between its first and its last element are not its own, it is read row by row.

    Raises:
        EOFError: the file is too short.
    """
    extent = tuple(target.shape)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    first = sum(start * stride for start, stride in zip(offset, strides))
    span = 1 + sum((length - 1) * stride for length, stride in zip(extent, strides))
    if target.numel() == 0:
        return
    if span > 2 * target.numel():
        for row in range(extent[0]):
            row_begin = begin + (offset[0] + row) * strides[0] * dtype.itemsize
            read_rectangle(file, row_begin, shape[1:], offset[1:], dtype, target[row])
        return
    begin += first * dtype.itemsize
    if span == target.numel() and target.dtype == dtype and target.is_cpu and target.is_contiguous():
        _fill(file, begin, target)
        return
    values = torch.empty(span, dtype=dtype)
    _fill(file, begin, values)
    target.copy_(values.as_strided(extent, strides))


def _fill(file: int, begin: int, tensor: torch.Tensor) -> None:
    """Read a contiguous tensor of a CPU from byte ``begin`` on."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a dimension of one may have any stride
    view = memoryview(flat.view(torch.uint8).numpy())
    while view:
        count = os.preadv(file, [view], begin)
        if count == 0:
            raise EOFError("the file ends too early")
        view, begin = view[count:], begin + count


def _open(path: Path):
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None


def _data_offset(path: Path, file: int, where) -> int:
    """Where in the archive that holds one tensor its bytes begin: torch.save stores them uncompressed, as
    ``data/0``."""
    try:
        view = _Part(file, where.offset, where.length)
        with zipfile.ZipFile(view) as archive:
            entry = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
        if entry.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("compressed")
        view.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(view.read(2), "little") for _ in range(2))
    except (zipfile.BadZipFile, StopIteration, OSError, ValueError) as error:
        raise DamagedError(f"{path}: no tensor at byte {where.offset} ({error or type(error).__name__})") from None
    return entry.header_offset + 30 + name + extra


class _Part(RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: int, begin: int, length: int):
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        data = os.pread(self._file, count, self._begin + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what metadata is made of: the file of a checkpoint from elsewhere runs no code."""

    _METADATA = "torch.distributed.checkpoint.metadata"
    _NAMES = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
    }

    def find_class(self, module: str, name: str):
        if "." not in name:  # a dotted name could lead anywhere
            if (module, name) in self._NAMES:
                return super().find_class(module, name)
            if module == self._METADATA and isinstance(found := super().find_class(module, name), type):
                return found
            if module == "torch" and isinstance(found := super().find_class(module, name), torch.dtype):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of metadata")
