"""The section `checkpoint` of a run file. Needs no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from moe_train.units import Duration, Interval


class CheckpointConfig(BaseModel):
    """When to save and what to keep. A run saves at its end and when it is stopped, whatever the interval."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    interval: Interval = Duration(steps=1000)
    keep_last: int = Field(3, ge=1)
    """The newest ones that stay."""
    keep_every: Interval | None = None
    """Besides them, one each so often stays for good; null: none."""
    async_save: bool = Field(True, alias="async")
    """Write in the background while training goes on."""
    initialize_from: str | None = None
    """A checkpoint whose weights alone start a new run; ignored once the run has checkpoints of its own."""
