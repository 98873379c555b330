"""The learning rate: a pure function of the tokens seen before a step.

Warm-up, stable, decay (WSD; JetMoE paper, eq. 13, after MiniCPM), cosine, or constant. In tokens, so that the
batch size, the number of ranks and restarts change nothing:

    JetMoE-8B: 10B warm-up from 10% of 5e-4, stable up to 1T, then 250B of decay down to 10%.
"""

from __future__ import annotations

import math

from moe_train.errors import UserError
from moe_train.training.config import ScheduleConfig


def learning_rate(
    tokens: int,
    schedule: ScheduleConfig,
    peak: float,
    total_tokens: int,
    tokens_per_step: int,
) -> float:
    """The learning rate of the step before which `tokens` tokens were seen.

    Args:
        peak: `optimizer.lr`.
        total_tokens: of the whole run, where the decay ends; beyond it the rate stays at its minimum.
        tokens_per_step: tokens of a full global batch, for durations that are written in steps.

    Raises:
        UserError: warm-up and decay do not fit into the run.
    """
    return LearningRate(schedule, peak, total_tokens, tokens_per_step)(tokens)


class LearningRate:
    """`learning_rate` with its durations checked and turned into tokens once."""

    def __init__(self, schedule: ScheduleConfig, peak: float, total_tokens: int, tokens_per_step: int):
        schedule = schedule.resolved(total_tokens, tokens_per_step)
        self.kind, self.form = schedule.kind, schedule.decay_form
        self.peak, self.minimum = peak, peak * schedule.min_lr_ratio
        self.initial = peak * schedule.warmup_init_ratio
        self.total = total_tokens
        self.warmup = schedule.warmup.in_tokens(tokens_per_step)
        self.decay = schedule.decay.in_tokens(tokens_per_step) if self.kind == "wsd" else 0
        excess = self.warmup + self.decay - total_tokens
        if 0 < excess < tokens_per_step and excess < self.decay:
            self.decay -= excess  # a run ends at a whole sequence, up to one before the tokens that were asked for
        elif excess > 0:
            parts = f"schedule.warmup ({schedule.warmup} = {self.warmup} tokens)"
            if self.kind == "wsd":
                parts += f" and schedule.decay ({schedule.decay} = {self.decay} tokens)"
            raise UserError(f"{parts} do not fit into a run of {total_tokens} tokens; shorten them or train longer")
        if self.decay and self.form == "exponential" and self.minimum == 0:
            raise UserError(
                "schedule.min_lr_ratio is 0, which an exponential decay never reaches; set it above 0, or decay_form: "
                "linear"
            )

    @property
    def decay_start(self) -> int:
        """Tokens after which the decay begins (wsd); before it, a checkpoint can be branched from."""
        return self.total - self.decay

    def __call__(self, tokens: int) -> float:
        """The learning rate after `tokens` tokens."""
        if tokens < self.warmup:
            return self.initial + (self.peak - self.initial) * (tokens / self.warmup)
        if self.kind == "cosine":
            length = self.total - self.warmup
            return self._between(min((tokens - self.warmup) / length, 1.0) if length else 1.0, "cosine")
        if self.kind == "constant" or not self.decay or tokens <= self.decay_start:
            return self.peak
        return self._between(min((tokens - self.decay_start) / self.decay, 1.0), self.form)

    def _between(self, progress: float, form: str) -> float:
        """From the peak (0) to the minimum (1)."""
        if progress >= 1.0:
            return self.minimum  # exactly, whatever the form rounds to
        if form == "exponential":
            return self.peak * (self.minimum / self.peak) ** progress
        share = {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "1-sqrt": 1.0 - math.sqrt(progress),
        }[form]
        return self.minimum + (self.peak - self.minimum) * share
