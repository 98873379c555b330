"""What can be set when a checkpoint is used: layout, precision and batch. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from data_pipeline.yaml_marks import Document, Mark, validate
from moe_train.config_file import parse_override
from moe_train.errors import UserError
from moe_train.model.config import ModelConfig
from moe_train.training.config import Section
from parallel.layout import Layout, ParallelConfig, resolve_layout


class ComputingConfig(Section):
    """The keys of a run file's section `training` that mean something without training."""

    precision: Literal["fp32", "bf16"] | None = None
    """null: that of the checkpoint."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences of one forward pass; null: as many as make about 8192 tokens."""


class InferenceConfig(Section):
    """Overrides of `moe-train score` and `moe-train generate`, in the words of a run file."""

    parallel: ParallelConfig = ParallelConfig()
    training: ComputingConfig = ComputingConfig()

    @classmethod
    def from_overrides(cls, overrides: Iterable[str]) -> InferenceConfig:
        """From ``parallel.tensor=2`` and the like. Raises an error with ``exit_code`` 2, one line."""
        document = Document({}, {(): Mark("overrides", 0)})
        for text in overrides:
            keys, value = parse_override(text)
            document.set(keys, value)
        config = validate(cls, document)
        if (config.parallel.virtual_pipeline or 1) > 1:
            raise UserError(
                "parallel.virtual_pipeline: virtual stages serve training alone; leave it out,"
                " parallel.pipeline is enough"
            )
        return config

    def layout(self, model: ModelConfig, world_size: int) -> Layout:
        """The layout of ``world_size`` ranks. Raises LayoutError, one line."""
        return resolve_layout(
            self.parallel,
            world_size,
            **model.extents(),
            micro_batch_size=1,
            global_batch_size=world_size,
        )
