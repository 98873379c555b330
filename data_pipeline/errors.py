"""The errors that this package raises on purpose. Each carries the exit status that a command should end with."""

from __future__ import annotations


class DataError(ValueError):
    """A user's mistake in a mixture file, an input or a request. The message is one line: where, what, how to fix it."""

    exit_code = 2


class DamagedDataError(DataError):
    """A file of the data is not what its own header or its manifest says: cut short, overwritten or corrupted."""

    exit_code = 4
