"""The errors that this package raises on purpose, and how they are said. Each carries the exit status that a command
should end with."""

from __future__ import annotations

import errno
import os
import sys

_FULL = {
    errno.ENOSPC: "make room, or choose another disk",
    errno.EDQUOT: "make room within the quota, or choose another disk",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose another disk",
}
"""What stops a write, whose error does not name the file."""

_REMEDIES = {
    **_FULL,
    errno.EACCES: "see who may read and write there, and enter the folders above",
    errno.EPERM: "see who may read and write there",
    errno.EROFS: "name a path on a disk that takes files",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOTDIR: "one of the folders in it is a file: correct the path",
}


def say(text: str) -> None:
    """A line on stderr, as long as somebody reads it: a reader that has gone (`| head`, a lost connection) ends no run
    and changes no exit status."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # what the old one still holds would fail once more when the process ends


def file_mistake(error: BaseException) -> str | None:
    """One line for an OSError that the user of a file can mend; None for any other error, also for one with an
    ``exit_code`` of its own."""
    if not isinstance(error, OSError) or hasattr(error, "exit_code"):
        return None
    if error.filename is None:
        remedy, place = _FULL.get(error.errno), "a file cannot be written"
    else:
        remedy, place = _REMEDIES.get(error.errno), error.filename
    return f"{place}: {error.strerror}; {remedy}" if remedy else None


class LayoutError(ValueError):
    """A layout that does not divide the ranks, the model or the batch. One line: the reason and the nearest
    that would do."""

    exit_code = 2


class EngineError(RuntimeError):
    """The engine cannot start as asked: a wrong version of megatron-core, a missing package, a device that is
    not there."""

    exit_code = 2


class LostRankError(RuntimeError):
    """A rank died or stopped answering; the others were stopped."""

    exit_code = 5


class RendezvousError(RuntimeError):
    """The port at which the ranks are to meet is taken."""

    exit_code = 5
