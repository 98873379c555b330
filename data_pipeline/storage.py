"""Where files lie: on this machine, or on an object store (``s3://bucket/key``). Reading, listing and telling
versions apart, in one way for both.

What an object store is asked is kept as small as opening needs: one listing a pattern says sizes and versions of
everything below it; `data_pipeline.s3`, and with it s3fs, is imported when the first such path is met.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Union

from data_pipeline.errors import DataError, MissingDataError

if TYPE_CHECKING:
    from data_pipeline.s3 import ObjectStore

Version = Union[int, str]
"""What changes when a file does: its modification time in ns, or an object's etag."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_THREADS = 16


def is_remote(path: str) -> bool:
    """Whether `path` is on an object store. Raises DataError for a kind of URL that is not read."""
    match = _SCHEME.match(path)
    if match is None:
        return False
    if match[1] != "s3":
        raise DataError(f"{path}: {match[1]}:// is not read; name s3://bucket/key or a path of this machine")
    return True


def _store() -> ObjectStore:
    from data_pipeline.s3 import store

    return store()


def find(paths: Sequence[str]) -> list[list[str]]:
    """The files that each of `paths` (a file's name, or a pattern) stands for, sorted; anew, nothing remembered."""
    if not any(map(is_remote, paths)):
        return [_find_local(path) for path in paths]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda p: _store().find(p) if is_remote(p) else _find_local(p), paths))


def _find_local(path: str) -> list[str]:
    return [path] if os.path.exists(path) else matches(path)


def matches(pattern: str) -> list[str]:
    """The files and folders of this machine that a pattern stands for, sorted. Folders that are there as they are
    written, such as ``[v2]``, are no part of the pattern."""
    there = _literal(pattern)
    return sorted(set(glob.glob(glob.escape(there) + pattern[len(there) :], recursive=True)))


def is_pattern(path: str) -> bool:
    """Whether `path` stands for what matches it, rather than for one file or folder of this name."""
    return glob.has_magic(path if is_remote(path) else path[len(_literal(path)) :])


def _literal(path: str) -> str:
    """The longest head of `path` that is there as it is written."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def forget() -> None:
    """What comes next shall see the object store as it is now, not as it was when something else was opened."""
    if "data_pipeline.s3" in sys.modules:
        sys.modules["data_pipeline.s3"].forget()


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return _store().facts(path) is not None if is_remote(path) else os.path.exists(path)


def facts(path: str) -> tuple[int, Version]:
    """Size and version of a file. Raises MissingDataError when it is missing."""
    if is_remote(path):
        found = _store().facts(path)
        if found is None:
            raise MissingDataError(f"{path}: cannot be read (no such object); check the path")
        return found
    try:
        stat = os.stat(path)
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return stat.st_size, stat.st_mtime_ns


def read(path: str, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes (all, unless given) of a file from byte `start`; fewer at its end. Raises DataError."""
    if is_remote(path):
        size, version = facts(path)
        stop = size if count is None else min(size, start + count)
        return _store().read(path, start, stop, str(version)) if start < stop else b""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read() if count is None else file.read(count)
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def absolute(path: str, base: str | os.PathLike[str]) -> str:
    """`path` from the folder `base`; a URL is absolute as it is."""
    if is_remote(path):
        return path
    return os.path.abspath(Path(base) / os.path.expanduser(path))
