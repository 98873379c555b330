"""What is known of a source's shards from an earlier start, so that opening ten thousand of them takes seconds.

For each shard: what its .idx says, its fingerprint, and whether its tokens were hashed and found to be what the
manifest says; good as long as sizes and modification times (etags, on an object store) of both files stay. Kept in
``$MOE_TRAIN_CACHE`` (default: ``~/.cache/moe-train``), one file a source; a cache that cannot be read or written is
done without.

Hashing terabytes would keep a job waiting. So each start hashes at most `verify_bytes()` of what is not known yet, of
all sources together in the order of their shards, and remembers it: small corpora are checked whole, large ones shard
by shard over several starts. Processes of one node that start together do it once: the first holds a lock, the others
wait for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline import storage
from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.units import parse_count

_FORMAT = 1
_WORTH_SHARDS, _WORTH_BYTES = 64, 1 << 26  # smaller sources are opened and hashed faster than looked up
_TOGETHER_SECONDS = 600.0  # starts within it count as one
_THREADS = 8
_PIECE = 1 << 23


def verify_bytes() -> int:
    """Bytes that one start hashes at most: ``$MOE_TRAIN_VERIFY_BYTES``, 8B unless set; 0 for none."""
    return bytes_of("MOE_TRAIN_VERIFY_BYTES", "8B")


def bytes_of(variable: str, default: str) -> int:
    """A number of bytes that an environment variable gives, as ``500B``."""
    try:
        return parse_count(os.environ.get(variable) or default)
    except DataError as error:
        raise DataError(f"the environment variable {variable}: {error}") from None


def cache_folder() -> Path:
    """Where catalogues are kept."""
    return Path(os.environ.get("MOE_TRAIN_CACHE") or Path.home() / ".cache" / "moe-train")


def stamp(prefix: str) -> list[int | str]:
    """Size and version (modification time or etag) of a shard's two files. Raises DataError when one is missing."""
    return [value for end in (".bin", ".idx") for value in storage.facts(prefix + end)]


class Allowance:
    """What one start may still hash. Safe to use from several threads."""

    def __init__(self) -> None:
        self._left, self._lock = verify_bytes(), threading.Lock()

    def take(self, size: int) -> bool:
        """Whether `size` bytes are left; then they are no longer."""
        with self._lock:
            enough = size <= self._left
            self._left -= size if enough else 0
            return enough


class Catalogue:
    """The entries of one source's shards, by prefix: ``{stamp, facts, fingerprint, verified}``.

    with catalogue_of(prefixes) as catalogue:
        entry = catalogue.get(prefix, stamp(prefix))
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self.hashed_at = 0.0
        self.changed = False
        if path is not None:
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                if stored["format"] == _FORMAT:
                    self.entries, self.hashed_at = stored["entries"], stored["hashed_at"]
            except (OSError, ValueError, KeyError, TypeError):
                pass

    def get(self, prefix: str, now: list[int | str]) -> dict[str, Any] | None:
        """What is known of a shard whose files are as `now` says."""
        entry = self.entries.get(prefix)
        return entry if entry is not None and entry["stamp"] == now else None

    def put(self, prefix: str, entry: dict[str, Any]) -> None:
        """Remember a shard."""
        self.entries[prefix] = entry
        self.changed = True

    def save(self) -> None:
        """Write it, if there is anything new; a later reader finds it whole or as it was."""
        if self.path is None or not self.changed:
            return
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        data = {"format": _FORMAT, "hashed_at": self.hashed_at, "entries": self.entries}
        try:
            partial.write_text(json.dumps(data), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError:
            partial.unlink(missing_ok=True)

    def verify(self, expected: dict[str, str], allowance: Allowance) -> None:
        """Hash the .bin files of prefixes (to the xxh3-128 of each) that are not known to be whole, as far as the
        start's `allowance` goes. Small sources have one of their own: nothing remembers them, so that they would use up
        that of the others at every start.

        Raises DamagedDataError for one that is not what its manifest says.
        """
        waiting = [prefix for prefix in expected if self.entries[prefix]["verified"] != expected[prefix]]
        if not waiting or time.time() - self.hashed_at < _TOGETHER_SECONDS:
            return
        sizes = {prefix: self.entries[prefix]["stamp"][0] for prefix in waiting}
        allowance = Allowance() if sum(sizes.values()) < _WORTH_BYTES else allowance
        chosen = [prefix for prefix in waiting if allowance.take(sizes[prefix])]
        with ThreadPoolExecutor(_THREADS) as threads:  # hashing and reading both let go of the interpreter
            for prefix, found in zip(chosen, threads.map(_hash, chosen), strict=True):
                if found != expected[prefix]:
                    raise DamagedDataError(
                        f"{prefix}.bin: its content has the hash {found}, its manifest says {expected[prefix]}; "
                        "it was changed or damaged: copy or prepare it again"
                    )
                self.entries[prefix]["verified"] = found
        self.hashed_at = time.time()
        self.changed = True


@contextmanager
def catalogue_of(prefixes: Iterable[str]) -> Iterator[Catalogue]:
    """The catalogue of a source, held by this process alone while it is open, and saved at the end."""
    names = list(prefixes)
    path = _path(names)
    try:
        lock = open(path.with_suffix(".lock"), "w") if path else None
    except OSError:
        path, lock = None, None
    try:
        if lock is not None:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
        catalogue = Catalogue(path)
        yield catalogue
        catalogue.save()
    finally:
        if lock is not None:
            lock.close()


def _path(prefixes: list[str]) -> Path | None:
    """Where the catalogue of these shards is; None when it is not worth having, or cannot be had."""
    try:
        size = sum(storage.facts(prefix + ".bin")[0] for prefix in prefixes[:_WORTH_SHARDS])
        if len(prefixes) < _WORTH_SHARDS and size < _WORTH_BYTES:
            return None
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    name = xxhash.xxh3_128_hexdigest("\n".join(storage.absolute(prefix, ".") for prefix in prefixes).encode())
    return folder / f"shards-{name}.json"


def _hash(prefix: str) -> str:
    digest, place, path = xxhash.xxh3_128(), 0, prefix + ".bin"
    while block := storage.read(path, place, _PIECE):
        digest.update(block)
        place += len(block)
    return digest.hexdigest()
