"""The schema of a run file, and `load_run`, which reads one. Needs neither torch nor megatron-core.

    config = load_run("configs/run/demo.yaml", ["training.max_steps=100"])
    config.model.num_layers, config.mixture.sequence_length, config.layout(world_size=2)

`configs/run/demo.yaml` is the reference: it has every key with a comment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import yaml
from pydantic import Field

from data_pipeline.yaml_marks import Document, YamlError, parse_yaml, read_yaml, validate
from moe_train.checkpoint.config import CheckpointConfig
from moe_train.config_file import load_document, load_part, shown
from moe_train.model.config import ModelConfig
from moe_train.training.config import (
    FaultsConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    Section,
    TrainingConfig,
)
from moe_train.units import Duration, Interval, Seconds
from parallel.layout import Layout, ParallelConfig, resolve_layout

if TYPE_CHECKING:
    from data_pipeline.mixture import MixtureConfig


class ValidationConfig(Section):
    """Loss on held-out windows, by source."""

    interval: Interval = Duration(steps=1000)
    samples: int = Field(64, ge=1)
    """Held-out sequences of each source."""


class DataConfig(Section):
    """What is fed."""

    mixture: str = Field(min_length=1)
    """The mixture file (sources, phases, weights), or the name of a preset."""
    document_mask: bool = False
    """Attention and positions restart where a document starts in a window; needs `tokenizer` in the mixture file, whose
    end-of-document token tells."""
    validation: ValidationConfig | None = ValidationConfig()
    """null: no validation."""


class LaunchConfig(Section):
    """Where the run is started; read by the launchers, not by the run."""

    cluster: str | None = None
    nodes: int = Field(1, ge=1)
    time: Seconds | None = None


class RunConfig(Section):
    """A run file with its sections. Paths are absolute once loaded."""

    output_dir: str = Field(min_length=1)
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    launch: LaunchConfig = LaunchConfig()

    @cached_property
    def mixture(self) -> MixtureConfig:
        """The mixture file, loaded and checked."""
        from data_pipeline.mixture import load_mixture

        return load_mixture(shown(self.data.mixture))

    @cached_property
    def document_end(self) -> int | None:
        """The token after which attention and positions restart; None without `data.document_mask`."""
        if not self.data.document_mask:
            return None
        from data_pipeline.tokenizer import load_tokenizer

        return load_tokenizer(self.mixture.tokenizer).eos_id

    @property
    def total_tokens(self) -> int:
        """Tokens of all phases of the mixture: what the schedule spans, whatever `training.max_steps`
        says."""
        return sum(phase.tokens for phase in self.mixture.phases)

    def end(self, step: int = 0, tokens: int = 0) -> int:
        """Tokens seen when the run is complete that stands at `step` and `tokens`: no whole batch is left, or
        `training.max_steps` is reached."""
        length = self.mixture.sequence_length
        return self.training.end(self.mixture.num_samples, length, step, tokens // length)[1] * length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one full global batch."""
        return self.training.global_batch_size * self.mixture.sequence_length

    def layout(self, world_size: int) -> Layout:
        """The layout of `world_size` ranks. Raises LayoutError, one line, when something does not divide."""
        warmup = self.training.batch_size_warmup
        sizes = [self.training.global_batch_size, *([warmup.start] if warmup else [])]
        layouts = [
            resolve_layout(
                self.parallel,
                world_size,
                **self.model.extents(),
                micro_batch_size=self.training.micro_batch_size,
                global_batch_size=size,
            )
            for size in sizes
        ]
        return layouts[0]

    def to_yaml(self) -> str:
        """The resolved config as YAML; `load_resolved` gives an equal one back."""
        data = self.model_dump(mode="json", by_alias=True)
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes for our own reader, to whom other words are numbers than to PyYAML (``5e-4``)."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        plain = parse_yaml(text, "").data == text
    except YamlError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


_Dumper.add_representer(str, _text)


def load_run(path: str | os.PathLike[str], overrides: Iterable[str] = (), *, with_mixture: bool = True) -> RunConfig:
    """The run file at `path`, or the preset of that name, with `overrides` (``a.b=c``) applied.

    `with_mixture=False` reads neither the mixture file nor what depends on it.

    Raises an error with ``exit_code`` 2, one line that names file and line (or the override), key and remedy.
    """
    document = load_document(path, overrides)
    config = validate(RunConfig, document)
    if with_mixture:
        config = config.model_copy(
            update={"schedule": config.schedule.resolved(config.total_tokens, config.tokens_per_step)}
        )
        _check_lengths(config, document)
        _check_fp8(config, document)
        _check_dispatcher(config, document)
        _check_overlap(config, document)
    return config


def load_resolved(path: str | os.PathLike[str]) -> RunConfig:
    """The `config.yaml` of a run's folder. Opens none of the files that it names: they may be gone by now.

    Raises an error with ``exit_code`` 2, one line.
    """
    return validate(RunConfig, read_yaml(shown(path)))


def load_model(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ModelConfig:
    """A model file, or the preset of that name (``jetmoe_8b``), with `overrides` of its keys
    (``num_layers=2``)."""
    return validate(ModelConfig, load_part(path, "model", overrides))


def _check_lengths(config: RunConfig, document: Document) -> None:
    """What only the model, the mixture and the schedule together can tell."""
    longest, length = config.model.max_sequence_length, config.mixture.sequence_length
    if length > longest:
        reason = f"{longest} is less than the mixture's sequence_length {length} ({config.data.mixture})"
        reason += f"; make it {length} or more"
        raise document.error(("model", "max_sequence_length"), reason)
    if config.data.document_mask and config.mixture.tokenizer is None:
        reason = f"needs to know which token ends a document; name the `tokenizer` in {config.data.mixture}"
        raise document.error(("data", "document_mask"), reason)
    schedule, total = config.schedule, config.total_tokens
    sequences = config.training.batch_size(0)
    if total < sequences * length:
        step = f"{sequences * length} of one step ({sequences} sequences of {length})"
        reason = f"its {total} tokens are less than the {step}; give the phases in {config.data.mixture} more, or make "
        reason += "training.global_batch_size smaller"
        raise document.error(("data", "mixture"), reason)
    warmup = schedule.warmup.in_tokens(config.tokens_per_step)
    decay = schedule.decay.in_tokens(config.tokens_per_step) if schedule.kind == "wsd" else 0
    if warmup + decay > total:
        parts = f"warmup {warmup} + decay {decay} tokens" if decay else f"warmup of {warmup} tokens"
        larger = "warmup" if warmup > decay else "decay"
        raise document.error(("schedule", larger), f"{parts} are more than the mixture's {total}; shorten them")


def _check_fp8(config: RunConfig, document: Document) -> None:
    """FP8 products want every dimension, on every tensor rank, to be a multiple of 16 (mxfp8: 32)."""
    training, model, ranks = config.training, config.model, config.parallel.tensor
    if training.precision != "fp8":
        return
    multiple = 32 if training.fp8_recipe == "mxfp8" else 16
    attention, mlp = model.attention, model.mlp
    rows = training.micro_batch_size * config.mixture.sequence_length
    sizes = {
        "hidden_size": (model.hidden_size, 1),
        "attention.head_dim x its heads": (attention.num_kv_heads * attention.head_dim, ranks),
        "mlp.ffn_hidden_size": (mlp.ffn_hidden_size, ranks if mlp.kind == "dense" else 1),
        "training.micro_batch_size x the mixture's sequence_length": (rows, 1),
    }
    for name, (size, parts) in sizes.items():
        if size % (multiple * parts):
            split = f" on {parts} tensor ranks" if parts > 1 else ""
            reason = f"fp8 multiplies in multiples of {multiple}, and {name} is {size}{split}; set bf16"
            raise document.error(("training", "precision"), reason)


def _check_dispatcher(config: RunConfig, document: Document) -> None:
    """An all-gather takes as much of every rank. DeepEP sends bf16, in pieces of 16 bytes, from memory that torch must
    not fill beside it as its deterministic mode does."""
    training, attention, parallel = config.training, config.model.attention, config.parallel
    if parallel.expert == 1:
        return
    reason = None
    if parallel.dispatcher == "allgather" and config.model.depth is not None:
        reason = "allgather takes as many tokens of every rank, and model.depth lets them pass by; take alltoall"
    elif parallel.dispatcher != "flex":
        return
    elif training.precision == "fp32":
        reason = "flex sends bf16 only; take alltoall, or set training.precision to bf16"
    elif training.deterministic:
        reason = "flex cannot be used with training.deterministic; take alltoall"
    elif config.model.hidden_size % 8 or attention.num_kv_heads * attention.head_dim % 8:
        reason = "flex sends rows of a multiple of 8 numbers, not of hidden_size or of attention.head_dim x its heads"
    if reason:
        raise document.error(("parallel", "dispatcher"), reason)


def _check_overlap(config: RunConfig, document: Document) -> None:
    """Whether micro-batches can take turns: while rows travel, in the middle of a layer."""
    if config.parallel.in_turn == 1:
        return
    reason = None
    if config.parallel.dispatcher != "alltoall":
        reason = f"hides the exchange of alltoall, not of {config.parallel.dispatcher}; take alltoall"
    elif config.training.precision == "fp8":
        reason = "cannot be used with fp8, whose weights would be rounded anew for every micro-batch; set bf16"
    elif config.training.recompute == "full":
        reason = "cannot be used with training.recompute: full, which takes a layer as one; take selective"
    if reason:
        raise document.error(("parallel", "overlap_dispatch"), reason)
