"""Blocks of remote files on this node's disk: shared by its processes, bounded, the least recently used go first.

They lie in ``$MOE_TRAIN_CACHE/blocks`` (default: ``~/.cache/moe-train/blocks``; a local disk is best), at most
``$MOE_TRAIN_CACHE_BYTES`` of them (default 20B, 0 keeps none). A file holds a block and its hash, so that what a crash
tore is not believed. A block that several processes want at once is fetched by one of them; the others wait for it.
A disk that is full or cannot be written is done without.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from data_pipeline.catalogue import bytes_of, cache_folder

_TRAILER = struct.Struct("<Q")
_LOCKS = 1024  # one lock file serves many blocks: seldom two at once
_KEPT = 0.9  # of the limit, after room was made
_TOUCH_SECONDS = 60.0


def cache_bytes() -> int:
    """The largest size of the cache: ``$MOE_TRAIN_CACHE_BYTES``, 20B unless set."""
    return bytes_of("MOE_TRAIN_CACHE_BYTES", "20B")


class BlockCache:
    """The cache of one node, as one of its processes sees it.

    block = cache.get(key, expected, fetch)
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or cache_folder() / "blocks"
        self.limit = cache_bytes() if limit is None else limit
        if self.limit:
            try:
                (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            except OSError:
                self.limit = 0

    def get(self, key: str, expected: int | None, fetch: Callable[[], bytes]) -> memoryview:
        """The block `key` (a hash in hex): from the disk, else from `fetch`, which is then kept.

        Args:
            expected: xxh3-64 that a block on disk must have; None where it is not known.
        """
        if not self.limit:
            return memoryview(fetch())
        path = self.folder / key[:2] / key
        found = self._open(path, expected)
        if found is not None:
            return found
        with self._lock(f"locks/{int(key[:8], 16) % _LOCKS:03x}"):
            found = self._open(path, expected)
            if found is None:
                data = fetch()
                self._keep(path, data)
                found = self._open(path, expected) or memoryview(data)  # mapped, it takes none of our memory
        return found

    def _open(self, path: Path, expected: int | None) -> memoryview | None:
        """A block of the disk, mapped; it stays readable when it is evicted. None where there is no sound one."""
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                mapped = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            if time.time() - stat.st_mtime > _TOUCH_SECONDS:
                os.utime(path)  # used now: the order of eviction
        except (OSError, ValueError):
            return None
        data = mapped[: -_TRAILER.size]
        if len(mapped) <= _TRAILER.size:
            return None
        digest = xxhash.xxh3_64_intdigest(data)
        if digest != _TRAILER.unpack(mapped[-_TRAILER.size :])[0] or expected not in (None, digest):
            return None
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a block, in the room that others leave: one process at a time, so that the count is right.

        It is raised before the block is there. So a process that is killed between the two leaves it too high, never
        too low, until the next eviction counts anew.
        """
        size = len(data) + _TRAILER.size
        if size > self.limit:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            with self._lock("lock"), open(self.folder / "size", "a+b") as counter:
                counter.seek(0)
                stored = counter.read()
                total = int(stored) if stored.isdigit() else None
                if total is None or total + size > self.limit:
                    total = self._evict(self.limit, size)
                counter.truncate(0)
                counter.write(str(total + size).encode())
                counter.flush()
                with open(partial, "wb") as file:
                    file.write(data)
                    file.write(_TRAILER.pack(xxhash.xxh3_64_intdigest(data)))
                os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _evict(self, limit: int, size: int) -> int:
        """Where `size` more bytes are too many, remove what was used least recently; the bytes that are left."""
        files = []
        for entry in self._files():
            with suppress(OSError):
                stat = entry.stat()
                if entry.name.endswith(".partial"):  # whoever wrote it was killed: others would hold the lock
                    os.unlink(entry.path)
                else:
                    files.append((stat.st_mtime, stat.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        room = limit - size if total + size <= limit else int(limit * _KEPT) - size
        for _, bytes_, path in sorted(files):
            if total <= room:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= bytes_
        return total

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self.folder):
            if folder.is_dir() and len(folder.name) == 2:
                yield from os.scandir(folder.path)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one thread of one process of this node (or none: a file system without locks)."""
        try:
            file = open(self.folder / name, "ab")
        except OSError:
            yield
            return
        with file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
