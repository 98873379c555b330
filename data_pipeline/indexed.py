"""Token files in Megatron's format: tokens in ``PREFIX.bin``, where documents begin in ``PREFIX.idx``.

    .idx = magic ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 sequences,
           u64 entries of the document index, int32 length of each sequence (tokens),
           int64 byte offset of each, int64 document index (from 0, one more than documents)

Files written here open in megatron-core's IndexedDataset, and its own files open here.
"""

from __future__ import annotations

import base64
import os
import struct
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import DamagedDataError, DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")
_LARGEST_DOCUMENT = 2**31 - 1
_INDEX_STEP = 1 << 20  # documents whose entries are in memory at once
_BLOCK_BYTES = 1 << 20  # each has a hash of its own in the manifest
_MAPPED = 256  # shards at once; each mapping holds a file open, of the 1024 that a process often may have


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16 for a vocabulary below 65,536 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65536 else np.int32)


def prefix_of(path: str | os.PathLike[str]) -> str:
    """``x.bin``, ``x.idx`` or ``x`` -> ``x``."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class IndexedReader:
    """One shard as a flat stream of tokens, on this machine or on an object store. Opening reads a few dozen bytes; the
    tokens are mapped, or fetched by blocks, when they are read.

    Attributes: ``prefix``, ``dtype``, ``num_tokens``, ``num_sequences``, ``num_documents``, ``remote``.

    Raises DataError when a file is missing, DamagedDataError when the two files do not agree.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        known: list[int] | None = None,
        entry: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a shard.

        Args:
            known: what `facts` gave for the same files before: then nothing is read.
            entry: what the manifest says of the .bin; a remote one is checked by it, block by block.
        """
        self.prefix = prefix_of(prefix)
        self.remote = storage.is_remote(self.prefix)
        self._entry = entry
        self._object = storage.facts(self.prefix + ".bin") if self.remote else None  # this version, whatever comes
        self._starts: np.ndarray | None = None
        if known is not None:
            code, self.num_tokens, self.num_sequences, self.num_documents = known
            self.dtype = np.dtype(DTYPES[code])
            return
        index, tokens = self.prefix + ".idx", self.prefix + ".bin"
        (size, _), (bin_size, _) = storage.facts(index), storage.facts(tokens)
        self._read_header(storage.read(index, 0, _HEADER.size), index, size)
        end = self._last_byte(index)
        if end != bin_size or bin_size % self.dtype.itemsize:
            raise DamagedDataError(
                f"{tokens}: holds {bin_size} bytes but its .idx describes {end}; it was cut short "
                "or replaced: prepare it again"
            )
        self.num_tokens = bin_size // self.dtype.itemsize

    @property
    def facts(self) -> list[int]:
        """Four numbers that stand for what opening the shard found out."""
        return [_CODES[self.dtype], self.num_tokens, self.num_sequences, self.num_documents]

    @staticmethod
    def facts_of(dtype: str, bin_bytes: int, idx_bytes: int) -> list[int]:
        """`facts` of a shard that IndexedWriter wrote, by the sizes of its files."""
        kind = np.dtype(dtype)
        documents = (idx_bytes - _HEADER.size - 8) // 20
        return [_CODES[kind], bin_bytes // kind.itemsize, documents, documents]

    def _read_header(self, header: bytes, index: str, size: int) -> None:
        if len(header) < _HEADER.size or header[:9] != MAGIC:
            raise DamagedDataError(f"{index}: is not a Megatron .idx file (wrong first bytes); prepare it again")
        _, version, code, self.num_sequences, entries = _HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise DamagedDataError(
                f"{index}: has version {version} and dtype code {code}; known are version 1 and {sorted(DTYPES)}"
            )
        self.dtype = np.dtype(DTYPES[code])
        self.num_documents = max(entries - 1, 0)
        expected = _HEADER.size + self.num_sequences * 12 + entries * 8
        # Files with a mode for each sequence (multimodal data) are longer by one byte a sequence.
        if size not in (expected, expected + self.num_sequences):
            raise DamagedDataError(f"{index}: is {size} bytes long, not {expected}; it was cut short: prepare it again")

    def _last_byte(self, index: str) -> int:
        """Where the last sequence ends in the .bin file, from two reads of the index."""
        count = self.num_sequences
        if not count:
            return 0
        (length,) = struct.unpack("<i", storage.read(index, _HEADER.size + (count - 1) * 4, 4))
        (pointer,) = struct.unpack("<q", storage.read(index, _HEADER.size + count * 4 + (count - 1) * 8, 8))
        return pointer + length * self.dtype.itemsize

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the flat stream, read-only: of a local file a view of its mapping."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"{self.prefix}: tokens {start}..{start + count} are outside 0..{self.num_tokens}")
        if not self.num_tokens:
            return np.empty(0, self.dtype)
        tokens = self._remote_tokens if self.remote else _mapped_tokens(self)
        return tokens[start : start + count]

    def expect(self, start: int, count: int) -> None:
        """Begin to fetch tokens that will be read soon, where fetching takes time."""
        if self.remote:
            self._remote_tokens.expect(start, start + count)

    @cached_property
    def _remote_tokens(self) -> Any:
        from data_pipeline.remote import RemoteTokens

        size, version = self._object
        return RemoteTokens(self.prefix + ".bin", self.dtype, size, str(version), self._entry)

    @property
    def document_starts(self) -> np.ndarray:
        """int64[num_documents + 1]: where each document begins in the flat stream; the end of the last."""
        if self._starts is None:
            if not self.num_documents:
                self._starts = np.zeros(1, np.int64)
                return self._starts
            offset = _HEADER.size + self.num_sequences * 4
            index = storage.read(self.prefix + ".idx", offset, self.num_sequences * 8 + (self.num_documents + 1) * 8)
            pointers, documents = np.split(np.frombuffer(index, "<i8"), [self.num_sequences])
            bounds = np.append(pointers, self.num_tokens * self.dtype.itemsize)
            self._starts = bounds[documents] // self.dtype.itemsize
        return self._starts

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        start, end = self.document_starts[index], self.document_starts[index + 1]
        return self.tokens(int(start), int(end - start))

    def document_at(self, token: int) -> int:
        """The number of the document that holds token `token` of the flat stream."""
        return int(np.searchsorted(self.document_starts, token, side="right")) - 1


@lru_cache(_MAPPED)
def _mapped_tokens(shard: IndexedReader) -> np.ndarray:
    mapped = np.memmap(shard.prefix + ".bin", dtype=shard.dtype, mode="r", shape=(shard.num_tokens,))
    return mapped.view(np.ndarray)  # slices of a memmap cost several times as much


class BlockDigests:
    """xxh3-64 of each mebibyte of a stream of bytes."""

    def __init__(self) -> None:
        self._finished = array("Q")
        self._current, self._filled = xxhash.xxh3_64(), 0

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while len(view):
            part = view[: _BLOCK_BYTES - self._filled]
            self._current.update(part)
            self._filled += len(part)
            if self._filled == _BLOCK_BYTES:
                self._finished.append(self._current.intdigest())
                self._current, self._filled = xxhash.xxh3_64(), 0
            view = view[len(part) :]

    def describe(self) -> dict[str, int | str]:
        """For the manifest: the size of a block, and the hashes (little-endian, in base64, since there are many)."""
        last = [self._current.intdigest()] if self._filled else []
        hashes = np.array([*self._finished, *last], "<u8")
        return {"bytes": _BLOCK_BYTES, "xxh3_64": base64.b64encode(hashes.tobytes()).decode()}


class IndexedWriter:
    """Writes a shard document by document, in memory that does not grow. Nothing exists under the final names before
    `close`.

        with IndexedWriter("corpus", np.uint16) as writer:
            writer.add(ids)                        # one document, its end-of-document token included

    Leaving the block by an exception removes what was written.

    Args:
        after: (tokens, documents) of an unfinished shard that `sync` made safe: it is gone on with from there.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: np.dtype | type[np.integer] = np.uint16,
        after: tuple[int, int] | None = None,
    ) -> None:
        self.prefix = prefix_of(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise DataError(f"{self.dtype} cannot be written to a .bin file; use uint16 or int32")
        self.num_tokens, self.num_documents = after or (0, 0)
        self._digest, self._blocks = xxhash.xxh3_128(), BlockDigests()
        self._limits = np.iinfo(self.dtype)
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        going_on = self.num_documents > 0
        self._file = open(self.prefix + ".bin.partial", "r+b" if going_on else "w+b")
        self._index = open(self.prefix + ".idx.partial", "r+b" if going_on else "w+b")
        if going_on:
            self._file.truncate(self.num_tokens * self.dtype.itemsize)
            self._index.truncate(_HEADER.size + self.num_documents * 4)
            self._index.seek(0, os.SEEK_END)
            for data in _pieces(self._file):
                self._digest.update(data)
                self._blocks.update(data)
        else:
            self._index.write(bytes(_HEADER.size))  # the header comes last

    def add(self, ids: np.ndarray) -> None:
        """Append one document. Raises DataError when an id does not fit the dtype: none is ever cut."""
        self.add_many(ids, [len(ids)])

    def add_many(self, ids: np.ndarray, lengths) -> None:
        """Append documents that lie one after another in `ids`; `lengths` are their numbers of tokens."""
        ids, lengths = np.asarray(ids), np.asarray(lengths, np.int64)
        if int(lengths.sum()) != len(ids):
            raise ValueError(f"lengths add up to {int(lengths.sum())}, not to {len(ids)}")
        if len(ids) and (int(ids.min()) < self._limits.min or int(ids.max()) > self._limits.max):
            raise DataError(f"token id {int(ids.max())} does not fit in {self.dtype}; use int32 for this vocabulary")
        if len(lengths) and lengths.max() > _LARGEST_DOCUMENT:
            raise DataError(
                f"a document of {lengths.max()} tokens is longer than the format allows (2^31 - 1); split it"
            )
        data = np.ascontiguousarray(ids, self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._blocks.update(data)
        self._index.write(lengths.astype("<i4").tobytes())
        self.num_tokens += len(ids)
        self.num_documents += len(lengths)

    def sync(self) -> tuple[int, int]:
        """Flush what is written to disk; (tokens, documents), from which another writer can go on."""
        for file in (self._file, self._index):
            file.flush()
            os.fsync(file.fileno())
        return self.num_tokens, self.num_documents

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the index, flush both partial files; ``{path: {bytes, xxh3_128}}`` by final name. The .bin has
        ``blocks`` besides: the hash of each of its blocks, for those who read it by ranges."""
        self._write_index()
        self.sync()
        self._file.close()
        digest, size = xxhash.xxh3_128(), self._index.seek(0, os.SEEK_END)
        for data in _pieces(self._index):
            digest.update(data)
        self._index.close()
        return {
            self.prefix + ".bin": {
                "bytes": self.num_tokens * self.dtype.itemsize,
                "xxh3_128": self._digest.hexdigest(),
                "blocks": self._blocks.describe(),
            },
            self.prefix + ".idx": {"bytes": size, "xxh3_128": digest.hexdigest()},
        }

    def _write_index(self) -> None:
        """The header, and what follows the lengths, which are there."""
        count, index = self.num_documents, self._index
        index.flush()
        end = 0
        for first in range(0, count, _INDEX_STEP):
            step = min(_INDEX_STEP, count - first)
            lengths = np.frombuffer(os.pread(index.fileno(), step * 4, _HEADER.size + first * 4), "<i4")
            ends = end + np.cumsum(lengths, dtype=np.int64)
            index.write(((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes())
            end = int(ends[-1])
        for first in range(0, count + 1, _INDEX_STEP):
            index.write(np.arange(first, min(first + _INDEX_STEP, count + 1), dtype="<i8").tobytes())
        index.seek(0)
        index.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], count, count + 1))

    def close(self) -> None:
        """Finish and publish."""
        self.finish()
        publish(self.prefix)

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._index.close()
        for end in (".bin.partial", ".idx.partial"):
            Path(self.prefix + end).unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.abandon()


def publish(prefix: str) -> None:
    """Give a finished shard its name, unless it has it already. The index comes last: a shard without it is not a
    shard."""
    for end in (".bin", ".idx"):
        with suppress(FileNotFoundError):
            os.replace(prefix + end + ".partial", prefix + end)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """A file from its beginning to its end."""
    file.seek(0)
    while data := file.read(1 << 22):
        yield data
