"""The section `checkpoint` of a run file. Needs no torch."""

from __future__ import annotations

from typing import Literal

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
    on_failed_save: Literal["continue", "stop"] = "continue"
    """When one cannot be written (a full disk): say so and go on, or end the run (status 6)."""
    copy_to: str | None = None
    """A second place for each of them: a folder on another file system, or a URL that fsspec knows
    (``s3://bucket/runs``). They lie there below the name of the run's folder, and are what ``--resume auto``
    takes when the run's own disk has none. Those of a run in another folder of that name are refused."""
    copy_keep_last: int = Field(2, ge=1)
    """The newest ones that stay there."""
    initialize_from: str | None = None
    """A checkpoint whose weights alone start a new run; ignored once the run has checkpoints of its own."""
