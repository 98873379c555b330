"""The errors that this package raises on purpose, each with the exit status of a command."""

from __future__ import annotations


class DataError(ValueError):
    """A user's mistake in a mixture file, an input or a request; one line: where, what, how to fix it."""

    exit_code = 2


class MissingDataError(DataError):
    """A file is not there, or cannot be read."""


class DamagedDataError(DataError):
    """A file is not what its own header or its manifest says: cut short, overwritten or corrupted."""

    exit_code = 4


class StoreError(DataError):
    """An object store did not answer, however often it was asked: start again when it does."""

    exit_code = 5


class WorkerError(DataError):
    """A process that did part of the work was killed, as a rule for want of memory: start again with fewer."""

    exit_code = 5
