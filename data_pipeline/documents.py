"""Raw text as a stream of documents: ``.txt`` (one a file), ``.jsonl`` and ``.jsonl.gz`` (one a line)."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from data_pipeline.errors import DamagedDataError, DataError

ENDINGS = (".txt", ".jsonl", ".jsonl.gz")

INVALID_UTF8 = "invalid UTF-8"
MALFORMED = "malformed line"
MISSING_FIELD = "missing field"
EMPTY = "empty document"


class RawDocument(NamedTuple):
    """A document before it is understood: a line of a .jsonl file, or a whole .txt file (`line` 0)."""

    file: str
    line: int
    data: bytes


class Document(NamedTuple):
    """A document's text, or what is wrong with it (one of the reasons above)."""

    file: str
    line: int
    text: Optional[str]
    problem: Optional[str]


def find_inputs(inputs: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files that `inputs` (files, folders, patterns) stand for: in the order given, sorted within a
    folder or pattern.

    Raises DataError: nothing there, or a kind of file that is not read.
    """
    files: list[str] = []
    for given in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        path = os.fspath(given)
        if os.path.isdir(path):
            found = sorted(
                str(file) for file in Path(path).rglob("*") if file.is_file() and file.name.endswith(ENDINGS)
            )
            if not found:
                raise DataError(f"{path}: the folder holds no {', '.join(ENDINGS)} file; check the path")
        elif os.path.isfile(path):
            found = [path]
        else:
            found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
            if not found:
                raise DataError(f"{path}: there is no such file, folder or match; check the path")
        for file in found:
            if not file.endswith(ENDINGS):
                raise DataError(f"{file}: is not read; the kinds of file are {', '.join(ENDINGS)}")
        files += found
    if not files:
        raise DataError("no input is given; name files, folders or patterns")
    return list(dict.fromkeys(files))


class RawReader:
    """Iterates over the raw documents of `files`. ``bytes_read`` counts bytes on disk, for progress."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = list(files)
        self.total_bytes = sum(os.path.getsize(file) for file in self.files)
        self._finished, self._current = 0, None

    @property
    def bytes_read(self) -> int:
        return self._finished + (self._current.tell() if self._current is not None else 0)

    def __iter__(self) -> Iterator[RawDocument]:
        for path in self.files:
            try:
                with open(path, "rb") as file:
                    self._current = file
                    yield from self._whole(path, file) if path.endswith(".txt") else self._lines(path, file)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DamagedDataError(f"{path}: is damaged ({error}); fetch it again") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error}); check it") from None
            finally:
                self._current = None
            self._finished += os.path.getsize(path)

    def _whole(self, path: str, file) -> Iterator[RawDocument]:
        yield RawDocument(path, 0, file.read())

    def _lines(self, path: str, file) -> Iterator[RawDocument]:
        lines = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
        for number, line in enumerate(lines, start=1):
            if line.strip():  # blank lines, such as a last one, are no documents
                yield RawDocument(path, number, line)


def understand(raw: RawDocument, text_key: str) -> Document:
    """The text of a raw document, or the reason why there is none."""

    def bad(reason: str) -> Document:
        return Document(raw.file, raw.line, None, reason)

    try:
        text = raw.data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return bad(INVALID_UTF8)
    if raw.line:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            return bad(MALFORMED)
        if not isinstance(record, dict):
            return bad(MALFORMED)
        text = record.get(text_key)
        if not isinstance(text, str):
            return bad(MISSING_FIELD)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate, written as an escape
            return bad(INVALID_UTF8)
    return Document(raw.file, raw.line, text, None) if text.strip() else bad(EMPTY)


def read_documents(files: Iterable[str], text_key: str = "text") -> Iterator[Document]:
    """Every document of `files`, in order."""
    for raw in RawReader(files):
        yield understand(raw, text_key)
