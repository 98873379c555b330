"""Errors that end a command with a status of their own; `moe_train.cli` prints them as one line.

A package below (`data_pipeline`, `parallel`) raises its own classes: what counts is the attribute
`exit_code`. Any exception without it is a bug: traceback, status 1.
"""

from __future__ import annotations

from parallel.errors import say


class UserError(Exception):
    """A user's mistake. The message is one line: what, where, how to fix it."""

    exit_code = 2


class StoppedError(Exception):
    """The run was stopped by a signal, a time limit or the file `stop`, after it saved: start it again to go
    on."""

    exit_code = 3


class DamagedError(Exception):
    """A checkpoint or another file of the run is not what its manifest says."""

    exit_code = 4


class HardwareError(Exception):
    """A device, a rank or the network failed, or the run hangs: start it again."""

    exit_code = 5


class PolicyStop(Exception):
    """The run stopped because its own rules say so (too many spikes, a crash loop): do not start it again
    unchanged."""

    exit_code = 6


def warn(text: str) -> None:
    """Say on stderr what a user should know and what does not end the command."""
    say(f"warning: {text}")
