"""Which rank the others wait for: each rank's own time of a step, and the judgement of it.

Ranks wait for each other, so their steps take equally long. What differs is when a rank has its gradients: the
time from the beginning of its step (reading included) to the reduction over the data-parallel ranks. Ranks that
share one replica of the model by tensors, stages or experts wait for each other within that time too, and so are
slow together."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

ALARM = 1.25
"""A rank whose time is over this many times the median is slow."""
IN_A_ROW = 3
"""Intervals that it is that before it is said: everybody is slow at times."""


class StepClock:
    """The time from :meth:`start` to :meth:`stop`, by the device's clock where the work is queued on one."""

    def __init__(self, device: torch.device):
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._times = [0.0, 0.0]

    def start(self) -> None:
        """The step begins."""
        self._note(0)

    def stop(self) -> None:
        """This rank's gradients are there (or queued)."""
        self._note(1)

    def seconds(self) -> float:
        """Between the two; waits for the device."""
        if self._events is None:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000.0

    def _note(self, which: int) -> None:
        if self._events is None:
            self._times[which] = time.perf_counter()
        else:
            self._events[which].record()


class SlowRanks:
    """Adds up every rank's seconds between two reports.

    Args:
        hosts: the name of each rank's host.
    """

    def __init__(self, hosts: list[str]):
        self.hosts = hosts
        self._seconds = [0.0] * len(hosts)
        self._suspect, self._times = -1, 0

    def add(self, seconds: list[float]) -> None:
        """The times of one step, by rank."""
        self._seconds = [sum(pair) for pair in zip(self._seconds, seconds)]

    def report(self) -> dict[str, Any]:
        """``{max_over_median, slowest, host}`` of the time since the last report."""
        slowest = max(range(len(self.hosts)), key=self._seconds.__getitem__)
        median = statistics.median(self._seconds)
        ratio = self._seconds[slowest] / median if median > 0 else 1.0
        self._seconds = [0.0] * len(self.hosts)
        suspect = slowest if ratio > ALARM else -1
        self._times = self._times + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        return {"max_over_median": ratio, "slowest": slowest, "host": self.hosts[slowest]}

    def warning(self, report: dict[str, Any]) -> str | None:
        """One line when the same rank has now been slow several reports in a row; None else, and after that."""
        if self._suspect < 0 or self._times != IN_A_ROW:
            return None
        return (
            f"rank {report['slowest']} on {report['host']} takes {report['max_over_median']:.2f} x the median rank's "
            "time for its part of a step: all others wait for it"
        )
