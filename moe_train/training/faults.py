"""Updates that had better not be made: losses or gradients that are not finite, and sudden spikes."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from moe_train.errors import PolicyStop
from moe_train.training.config import FaultsConfig

WINDOW = 128
"""Steps that a new loss is compared with."""
SKIP_WINDOW = 1000
"""Steps within which ``max_skips`` updates may be left out: a long run may meet many bad batches, not many at once."""
ENOUGH = 32
"""Steps before anything is called a spike."""
LEAST_RISE = 0.1
"""A spike is at least this much above the mean, as a part of it: a flat curve has a standard deviation of almost
nothing."""


@dataclass(frozen=True)
class Fault:
    """Why an update is not made, and what is done about it: ``skip`` leaves it out, ``rewind`` also goes back to the
    last checkpoint."""

    text: str
    action: Literal["skip", "rewind"]


class FaultGuard:
    """Judges each step before its update, from figures that are the same on every rank, so that all ranks agree.

    Attributes:
        skips: updates that were not made so far, for whichever reason.
    """

    def __init__(self, config: FaultsConfig):
        self.config = config
        self.skips = 0
        self._recent: deque[int] = deque()  # steps left out within SKIP_WINDOW
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._segment: int | None = None  # whose losses these are

    def judge(self, step: int, loss: float, gradient_norm: float, segment: int = 0) -> Fault | None:
        """What is wrong with ``step``, or None to make its update.

        Args:
            segment: of the ledger, that feeds the step. Other data may have another loss for good: a step is compared
                with those of its own segment alone.

        Raises:
            PolicyStop: the config says to stop on this, or ``max_skips`` is used up.
        """
        if segment != self._segment:
            self._losses.clear()
            self._norms.clear()
            self._segment = segment
        text, action = self._fault(loss, gradient_norm)
        if text is None:
            self._losses.append(loss)
            self._norms.append(gradient_norm)
            return None
        if action == "stop":
            raise PolicyStop(
                f"step {step}: {text}; the checkpoint before it is kept, look at its data or lower the learning rate"
            )
        while self._recent and self._recent[0] <= step - SKIP_WINDOW:
            self._recent.popleft()
        if len(self._recent) >= self.config.max_skips:
            raise PolicyStop(
                f"step {step}: {text}, and faults.max_skips {self.config.max_skips} of the last {SKIP_WINDOW} updates "
                "were left out before; "
                f"resume from an earlier checkpoint with a lower learning rate, or raise max_skips"
            )
        self.skips += 1
        self._recent.append(step)
        return Fault(text, action)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "skips": self.skips,
            "recent": list(self._recent),
            "losses": list(self._losses),
            "norms": list(self._norms),
            "segment": self._segment,
        }

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` gave."""
        self.skips, self._recent = state["skips"], deque(state.get("recent", ()))
        self.rewind(state)

    def rewind(self, state: dict) -> None:
        """Compare with what an earlier :meth:`state` compared with. What was left out since stays counted."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._norms = deque(state["norms"], maxlen=WINDOW)
        self._segment = state.get("segment")

    def _fault(self, loss: float, gradient_norm: float) -> tuple[str | None, str]:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"loss {loss:g} or gradient norm {gradient_norm:g} is not finite", self.config.on_nonfinite
        if self.config.on_spike != "ignore":
            figures = ("loss", loss, self._losses), ("gradient norm", gradient_norm, self._norms)
            for name, value, window in figures:
                limit = spike_limit(window, self.config.spike_deviations)
                if value > limit:
                    return f"{name} {value:.4g} is a spike (limit {limit:.4g})", self.config.on_spike
        return None, ""


def spike_limit(window: deque[float], deviations: float) -> float:
    """The value from which on the next one is a spike; infinite while there is too little to compare with."""
    if len(window) < ENOUGH:
        return math.inf
    mean = sum(window) / len(window)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / len(window))
    return mean + max(deviations * deviation, LEAST_RISE * abs(mean))
