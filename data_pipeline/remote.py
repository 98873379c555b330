"""The tokens of an object, as if they lay in an array on this machine: read by blocks of a mebibyte, ahead of
their use, through the node's cache.

A block is believed only with the hash that the corpus's manifest gives for it; so every byte that is trained on has
been compared with what `prepare` wrote, although no shard is ever fetched whole. A block that arrives otherwise is
fetched anew, and then damage. Objects without a manifest are what their etag and length say, no more.
"""

from __future__ import annotations

import base64
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.block_cache import BlockCache
from data_pipeline.errors import DamagedDataError

BLOCK_BYTES = 1 << 20
"""A chunk of `data_pipeline.order` touches one or two; larger ones would be read for a smaller part of them."""
_THREADS = 16  # that read ahead
_MAPPED = 256  # blocks that a process has at hand; the others are on the node's disk
_AHEAD = 1024  # at most that many are asked for before they are used


class Block(NamedTuple):
    """`size` bytes of an object, from byte `start`."""

    url: str
    version: str
    start: int
    size: int
    expected: int | None

    @property
    def key(self) -> str:
        """Its name in the cache."""
        text = f"{self.url}\0{self.version}\0{self.start}\0{self.size}"
        return xxhash.xxh3_128_hexdigest(text.encode())


class RemoteTokens:
    """The tokens of one object; a slice of it is a numpy array.

    Args:
        size: bytes of the object; with `version`, its etag, as a listing gave them.
        entry: what the manifest says of the file; None without one.

    Raises (when sliced) DamagedDataError or StoreError.
    """

    def __init__(
        self, url: str, dtype: np.dtype, size: int, version: str, entry: Mapping[str, Any] | None = None
    ) -> None:
        self.url, self.dtype, self._size, self._version = url, np.dtype(dtype), size, version
        self._hashes, self._block = block_hashes(entry)

    def __getitem__(self, span: slice) -> np.ndarray:
        width = self.dtype.itemsize
        start, stop = span.start * width, span.stop * width
        pieces = []
        for block in self._blocks(start, stop):
            data = blocks().get(block)
            pieces.append(data[max(0, start - block.start) : min(stop - block.start, block.size)])
        if len(pieces) == 1:
            return np.frombuffer(pieces[0], self.dtype)
        return np.frombuffer(b"".join(pieces), self.dtype)

    def expect(self, start: int, stop: int) -> None:
        """Begin to fetch what tokens [start, stop) need."""
        for block in self._blocks(start * self.dtype.itemsize, stop * self.dtype.itemsize):
            blocks().expect(block)

    def _blocks(self, start: int, stop: int) -> Iterator[Block]:
        if start >= stop:
            return
        for number in range(start // self._block, (stop - 1) // self._block + 1):
            first = number * self._block
            expected = None if self._hashes is None else int(self._hashes[number])
            yield Block(self.url, self._version, first, min(self._block, self._size - first), expected)


def block_hashes(entry: Mapping[str, Any] | None) -> tuple[np.ndarray | None, int]:
    """Of a manifest's entry of a file: xxh3-64 of each of its blocks (uint64[n]; None without), and their size."""
    stored = (entry or {}).get("blocks")
    if stored is None:
        return None, BLOCK_BYTES
    return np.frombuffer(base64.b64decode(stored["xxh3_64"]), "<u8"), int(stored["bytes"])


class Blocks:
    """The blocks that this process has at hand or under way. Safe to use from several threads."""

    def __init__(self, cache: BlockCache) -> None:
        self.cache = cache
        self._lock = threading.Lock()
        self._mapped: OrderedDict[Block, memoryview] = OrderedDict()
        self._coming: dict[Block, Future[memoryview]] = {}
        self._wanted: queue.SimpleQueue[Block] = queue.SimpleQueue()
        for _ in range(_THREADS):  # an executor's threads would keep a process that ends waiting for the store
            threading.Thread(target=self._work, name="blocks", daemon=True).start()

    @property
    def ahead(self) -> int:
        """How many blocks it makes sense to ask for before they are used: they must all find room."""
        room = self.cache.limit // 4 // BLOCK_BYTES if self.cache.limit else _MAPPED // 2
        return max(1, min(_AHEAD, room))

    def get(self, block: Block) -> memoryview:
        """The bytes of `block`, of the right hash. Raises DamagedDataError or StoreError."""
        with self._lock:
            found, coming = self._mapped.get(block), self._coming.get(block)
            if found is not None:
                self._mapped.move_to_end(block)
                return found
        if coming is not None:
            try:
                return coming.result()
            except Exception:  # what went wrong then is told, or mended, now
                pass
        return self._load(block)

    def expect(self, block: Block) -> None:
        """Begin to fetch `block`, if nobody did."""
        with self._lock:
            if block in self._mapped or block in self._coming or len(self._coming) >= self.ahead:
                return
            self._coming[block] = Future()
        self._wanted.put(block)

    def _work(self) -> None:
        while True:
            block = self._wanted.get()
            coming = self._coming[block]
            try:
                coming.set_result(self._load(block))
            except BaseException as error:  # whoever waits must not wait for ever
                coming.set_exception(error)
            with self._lock:
                del self._coming[block]

    def _load(self, block: Block) -> memoryview:
        data = self.cache.get(block.key, block.expected, lambda: _fetch(block))
        with self._lock:
            self._mapped[block] = data
            while len(self._mapped) > _MAPPED:
                self._mapped.popitem(last=False)
        return data


def _fetch(block: Block) -> bytes:
    from data_pipeline import s3

    for _ in range(s3.SPOILT_TRIES):
        end = block.start + block.size
        data = s3.store().read(block.url, block.start, end, block.version, s3.READING_SECONDS)
        found = xxhash.xxh3_64_intdigest(data)
        if block.expected in (None, found):
            return data
    raise DamagedDataError(
        f"{block.url}: bytes {block.start}..{block.start + block.size} have the hash {found:016x}, its manifest "
        f"says {block.expected:016x}; it was changed or damaged: copy or prepare it again"
    )


_blocks: dict[int, Blocks] = {}
_making = threading.Lock()


def blocks() -> Blocks:
    """This process's blocks (a forked one has threads of its own)."""
    with _making:
        if os.getpid() not in _blocks:
            _blocks.clear()
            _blocks[os.getpid()] = Blocks(BlockCache())
        return _blocks[os.getpid()]
