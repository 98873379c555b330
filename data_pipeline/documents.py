"""Raw text as a stream of documents: ``.txt`` (one a file), ``.jsonl``, ``.jsonl.gz`` and ``.jsonl.zst`` (one a
line), ``.parquet`` and ``.arrow`` (one a row)."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from data_pipeline import columnar
from data_pipeline.errors import DamagedDataError, DataError
from data_pipeline.filters import Filter, lookup
from data_pipeline.storage import matches

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", *columnar.ENDINGS)
_PACKED = (".gz", ".zst", ".parquet")

INVALID_UTF8 = "invalid UTF-8"
MALFORMED = "malformed line"
MISSING_FIELD = "missing field"
EMPTY = "empty document"
FILTERED = "filtered out"
"""Not a fault of the document: a filter did not accept it."""


class RawDocument(NamedTuple):
    """A document before it is understood: a line of a .jsonl file, a whole .txt file (`line` 0), or a row of a
    table (its fields)."""

    file: str
    line: int
    data: Union[bytes, dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes, about."""
        if isinstance(self.data, bytes):
            return len(self.data)
        return sum(len(value) if isinstance(value, (bytes, str)) else 8 for value in self.data.values())


class Document(NamedTuple):
    """A document's text, or what is wrong with it (one of the reasons above)."""

    file: str
    line: int
    text: Optional[str]
    problem: Optional[str]


def find_inputs(inputs: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files that `inputs` (files, folders, patterns) stand for: in the order given, sorted within a
    folder or pattern. Links are followed, and a file that is there by several names comes once, by the first.

    Raises DataError: nothing there, or a kind of file that is not read.
    """
    files: list[str] = []
    for given in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        path = os.fspath(given)
        if os.path.isdir(path):
            found = sorted(_files_in(path))
            if not found:
                raise DataError(f"{path}: the folder holds no {', '.join(ENDINGS)} file; check the path")
        elif os.path.isfile(path):
            found = [path]
        else:
            found = [file for file in matches(path) if os.path.isfile(file)]
            if not found:
                raise DataError(f"{path}: there is no such file, folder or match; check the path")
        for file in found:
            if not file.endswith(ENDINGS):
                raise DataError(f"{file}: is not read; the kinds of file are {', '.join(ENDINGS)}")
        files += found
    if not files:
        raise DataError("no input is given; name files, folders or patterns")
    once: dict[str, str] = {}
    for file in files:
        once.setdefault(os.path.realpath(file), file)
    return list(once.values())


def _files_in(folder: str) -> Iterator[str]:
    """The input files at any depth of `folder`; a folder to which several links lead, or a circle, comes once."""
    seen: set[str] = set()
    for path, folders, names in os.walk(Path(folder), followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # by which of its names a folder comes does not depend on the disk
        files = (os.path.join(path, name) for name in names if _is_input(name))
        yield from filter(os.path.isfile, files)


def _is_input(name: str) -> bool:
    # beside its data, `datasets` leaves what its own map and filter computed as cache-*.arrow
    return name.endswith(ENDINGS) and not (name.startswith("cache-") and name.endswith(".arrow"))


def unpacked_bytes(files: Iterable[str]) -> int:
    """How much `files` hold, about: what is packed comes to four times its size."""
    return sum(os.path.getsize(file) * (4 if file.endswith(_PACKED) else 1) for file in files)


class RawReader:
    """Iterates over the raw documents of `files`. ``bytes_read`` counts bytes on disk, for progress.

    Args:
        fields: the fields that are needed, the text's first (tables are read by column).
        after: (absolute path, line) of the last document that is not wanted again.

    Raises DataError: a file cannot be read, or is damaged; `after` is in none of them.
    """

    def __init__(
        self, files: Iterable[str], fields: Sequence[str] = ("text",), after: tuple[str, int] | None = None
    ) -> None:
        self.files, self.fields, self.after = list(files), list(fields), after
        self.total_bytes = sum(os.path.getsize(file) for file in self.files)
        self._finished, self._current = 0, None

    @property
    def bytes_read(self) -> int:
        return self._finished + (self._current.tell() if self._current is not None else 0)

    def __iter__(self) -> Iterator[RawDocument]:
        skipping = self.after is not None
        for path in self.files:
            after = -1
            if skipping:
                if os.path.abspath(path) == self.after[0]:
                    skipping, after = False, self.after[1]
                else:
                    self._finished += os.path.getsize(path)
                    continue
            try:
                with open(path, "rb") as file:
                    self._current = file
                    yield from (raw for raw in self._documents(path, file) if raw.line > after)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DamagedDataError(f"{path}: is damaged ({error}); fetch it again") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error}); check it") from None
            finally:
                self._current = None
            self._finished += os.path.getsize(path)
        if skipping:
            raise DataError(
                f"{self.after[0]}: the unfinished corpus ends in it, but it is not among the inputs; name it too, or "
                "start again with --overwrite"
            )

    def _documents(self, path: str, file: Any) -> Iterator[RawDocument]:
        if path.endswith(".txt"):
            yield RawDocument(path, 0, file.read())
        elif path.endswith(columnar.ENDINGS):
            for number, row in enumerate(columnar.rows(path, self.fields), start=1):
                yield RawDocument(path, number, row)
        else:
            for number, line in enumerate(_lines(path, file), start=1):
                if line.strip():  # blank lines, such as a last one, are no documents
                    yield RawDocument(path, number, line)


def _lines(path: str, file: Any) -> Iterable[bytes]:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    return _zstd_lines(path, file) if path.endswith(".zst") else file


def _zstd_lines(path: str, file: Any) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: needs the package zstandard; pip install zstandard") from None
    # The Pile and others were packed with windows of up to 2 GiB, above the library's default limit.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    try:
        yield from io.BufferedReader(_Pieces(_zstd_pieces(file, decompressor)), 1 << 20)
    except zstandard.ZstdError as error:
        raise DamagedDataError(f"{path}: is damaged ({error}); fetch it again") from None


def _zstd_pieces(file: Any, decompressor: Any) -> Iterator[bytes]:
    """The decompressed frames of a file. The library's own stream takes a file cut short for a whole one."""
    frame = None
    while piece := file.read(1 << 15):
        while piece:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(piece)
            piece = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends within a zstd frame")


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a raw file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._pieces))
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def understand(raw: RawDocument, text_key: str, filters: Sequence[Filter] = ()) -> Document:
    """The text of a raw document, or the reason why there is none."""

    def bad(reason: str) -> Document:
        return Document(raw.file, raw.line, None, reason)

    try:
        text: Any
        if isinstance(raw.data, dict):
            record = raw.data
        else:
            text = raw.data.decode("utf-8").removeprefix("\ufeff")
            record = json.loads(text) if raw.line else {text_key: text}
        if not isinstance(record, dict):
            return bad(MALFORMED)
        if not all(condition.accepts(record) for condition in filters):
            return bad(FILTERED)
        text = lookup(record, text_key)
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if not isinstance(text, str):
            return bad(MISSING_FIELD)
        text.encode("utf-8")
    except UnicodeError:  # on encoding: a lone surrogate, written as an escape
        return bad(INVALID_UTF8)
    except (ValueError, RecursionError):
        return bad(MALFORMED)
    return Document(raw.file, raw.line, text, None) if text.strip() else bad(EMPTY)


def read_documents(files: Iterable[str], text_key: str = "text") -> Iterator[Document]:
    """Every document of `files`, in order."""
    for raw in RawReader(files, [text_key]):
        yield understand(raw, text_key)
