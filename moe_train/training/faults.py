"""Updates that had better not be made: losses or gradients that are not finite, and sudden spikes."""
from __future__ import annotations

import math
from collections import deque

from moe_train.errors import PolicyStop
from moe_train.training.config import FaultsConfig

WINDOW = 128
"""Steps that a new loss is compared with."""
ENOUGH = 32
"""Steps before anything is called a spike."""
DEVIATIONS = 6.0
"""A spike is this many standard deviations above the mean of the window."""
LEAST_RISE = 0.1
"""And this much, as a part of the mean: a flat curve has a standard deviation of almost nothing."""


class FaultGuard:
    """Judges each step before its update, from figures that are the same on every rank, so that all ranks agree."""

    def __init__(self, config: FaultsConfig):
        self.config = config
        self.skips = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def judge(self, step: int, loss: float, gradient_norm: float) -> str | None:
        """Why the update of ``step`` is to be skipped, or None to make it.

        Raises:
            PolicyStop: the config says to stop on this, or ``max_skips`` is used up.
        """
        fault, action = None, "ignore"
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            fault, action = f"loss {loss:g} or gradient norm {gradient_norm:g} is not finite", self.config.on_nonfinite
        elif self.config.on_spike != "ignore":
            for name, value, window in (("loss", loss, self._losses), ("gradient norm", gradient_norm, self._norms)):
                limit = _limit(window)
                if value > limit:
                    fault, action = f"{name} {value:.4g} is a spike (limit {limit:.4g})", self.config.on_spike
        if fault is None:
            self._losses.append(loss)
            self._norms.append(gradient_norm)
            return None
        if action == "stop":
            raise PolicyStop(f"step {step}: {fault}; the checkpoint before it is kept, look at its data or lower the learning rate")
        self.skips += 1
        if self.skips > self.config.max_skips:
            raise PolicyStop(
                f"step {step}: {fault}, and faults.max_skips {self.config.max_skips} updates were skipped before; "
                f"resume from an earlier checkpoint with a lower learning rate, or raise max_skips"
            )
        return fault

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"skips": self.skips, "losses": list(self._losses), "norms": list(self._norms)}

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` gave."""
        self.skips = state["skips"]
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._norms = deque(state["norms"], maxlen=WINDOW)


def _limit(window: deque[float]) -> float:
    """The value from which on the next one is a spike."""
    if len(window) < ENOUGH:
        return math.inf
    mean = sum(window) / len(window)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / len(window))
    return mean + max(DEVIATIONS * deviation, LEAST_RISE * abs(mean))
