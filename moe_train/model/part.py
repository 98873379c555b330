"""What the parts of a model's config have in common. Needs no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict


class ModelPart(BaseModel):
    """Strict, frozen, and without unknown keys: what a model file says is what is built."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Weight(NamedTuple):
    """A parameter of one layer: its global shape, and whether tensor ranks each hold a part of it, expert ranks
    whole experts of it (its first dimension counts them), or every rank all of it."""

    shape: tuple[int, ...]
    split: Literal["whole", "tensor", "expert"] = "whole"
