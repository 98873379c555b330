"""The manifest of a checkpoint: size and hash of every file, and the manifest's own hash beside it. Needs no torch."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

from moe_train.errors import DamagedError

MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.json.xxh3"
_BLOCK = 1 << 22


def hash_file(path: Path) -> str:
    """xxh3-128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """``{name: {"bytes", "xxh3_128"}}`` of files that are on disk (they are flushed first)."""
    entries = {}
    for name in names:
        path = folder / name
        flush(path)
        entries[name] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    return entries


def write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    """Write the manifest and, last, its hash: a folder without it is not a checkpoint."""
    for name, text in (
        (MANIFEST, json.dumps({"files": dict(sorted(entries.items()))}, indent=1) + "\n"),
        (MANIFEST_HASH, None),
    ):
        path = folder / name
        path.write_text(hash_file(folder / MANIFEST) + "\n" if text is None else text, encoding="utf-8")
        flush(path)
    flush(folder)


def read_manifest(folder: Path) -> dict[str, dict]:
    """The entries of a complete checkpoint.

    Raises:
        DamagedError: there is no manifest, or it is not the one that was written.
    """
    try:
        expected = (folder / MANIFEST_HASH).read_text(encoding="utf-8").strip()
        if hash_file(folder / MANIFEST) != expected:
            raise DamagedError(f"{folder / MANIFEST}: its hash is not the one in {MANIFEST_HASH}")
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing: the checkpoint was not finished or is damaged") from None
    except (UnicodeDecodeError, ValueError, KeyError) as error:
        raise DamagedError(f"{folder / MANIFEST} is unreadable ({type(error).__name__})") from None


def check_files(folder: Path, entries: dict[str, dict], hashes: bool = True) -> str | None:
    """What is wrong with the files of ``entries``: the first one's name and the reason, or None.

    Without ``hashes`` no file is read: only that it is there, and its size.
    """
    for name, entry in entries.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes, not the {entry['bytes']} that were written"
        if hashes and hash_file(path) != entry["xxh3_128"]:
            return f"{name} has other contents than were written (hash)"
    return None


def flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
