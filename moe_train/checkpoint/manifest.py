"""The manifest of a checkpoint: size and hash of every file, and the manifest's own hash beside it. Needs no
torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

from moe_train.errors import DamagedError

MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.json.xxh3"
_BLOCK = 1 << 22


class UnreadableError(DamagedError):
    """A file cannot be read: that is of the disk, its mount or a permission, and says nothing of the contents."""


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """``{name: {"bytes", "xxh3_128"}}`` of files that are on disk (they are flushed first). For small files:
    it reads them."""
    entries = {}
    for name in names:
        path = folder / name
        flush(path)
        entries[name] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    return entries


def write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    """Write the manifest and, last, its hash: a folder without it is not a checkpoint."""
    text = (json.dumps({"files": dict(sorted(entries.items()))}, indent=1) + "\n").encode()
    for name, content in ((MANIFEST, text), (MANIFEST_HASH, _hash_line(text))):
        (folder / name).write_bytes(content)
        flush(folder / name)
    flush(folder)


def read_manifest(folder: Path) -> dict[str, dict]:
    """The entries of a complete checkpoint.

    Raises:
        UnreadableError: it cannot be read.
        DamagedError: there is no manifest, or it is not the one that was written.
    """
    return _entries(folder)[0]


def manifest_hash(folder: Path) -> str:
    """What tells this checkpoint from any other; raises as :func:`read_manifest` does."""
    return _entries(folder)[1]


def is_complete(folder: Path) -> bool:
    """Whether the folder was finished: its manifest is there and whole. Reads no other file."""
    try:
        _entries(folder)
    except DamagedError:
        return False
    return True


def check_files(folder: Path, entries: dict[str, dict], hashes: bool = True) -> str | None:
    """What is wrong with the files of ``entries``: the first one's name and the reason, or None.

    Without ``hashes`` no file is read: only that it is there, and its size.
    """
    for name, entry in entries.items():
        try:
            if reason := check_file(folder / name, entry, hashes):
                return reason
        except UnreadableError as error:
            return str(error)
    return None


def check_file(path: Path, entry: dict, hashes: bool = True) -> str | None:
    """What is wrong with one file, by its name, or None.

    Raises:
        UnreadableError: that cannot be told.
    """
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path.name} has {size} bytes, not the {entry['bytes']} that were written"
        if hashes and hash_file(path) != entry["xxh3_128"]:
            return f"{path.name} has other contents than were written (hash)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        raise UnreadableError(f"{path.name} cannot be read ({error.strerror})") from None
    return None


def flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_line(text: bytes) -> bytes:
    return f"{xxhash.xxh3_128_hexdigest(text)}\n".encode()


def _entries(folder: Path) -> tuple[dict[str, dict], str]:
    try:
        text, line = (folder / MANIFEST).read_bytes(), (folder / MANIFEST_HASH).read_bytes()
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing: the checkpoint was not finished or is damaged") from None
    except OSError as error:
        raise UnreadableError(f"{error.filename} cannot be read ({error.strerror})") from None
    if line != _hash_line(text):  # byte for byte: a damaged line end counts too
        raise DamagedError(
            f"{folder / MANIFEST} and the hash in {MANIFEST_HASH} do not belong together: one of them is damaged"
        )
    return json.loads(text)["files"], line.decode().strip()
