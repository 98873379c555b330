"""The errors that this package raises on purpose. Each carries the exit status that a command should end
with."""

from __future__ import annotations


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
