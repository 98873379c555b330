"""`moe-train pretrain --dry-run`: everything that can be checked before a GPU is asked for, printed. Needs no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from data_pipeline.units import format_count
from parallel.layout import Layout, smallest_world

if TYPE_CHECKING:
    from moe_train.config import RunConfig


def dry_run(config: RunConfig, nproc: int | None = None) -> None:
    """Print config, model, layout and mixture of `config` for `nproc` processes, and start nothing.

    Without `nproc` the number of processes is the launcher's (torchrun, Slurm), else the fewest that the layout takes.

    Raises what `pretrain` would raise: a layout that does not divide, a missing corpus, a source whose epochs run out.
    """
    from data_pipeline.ledger import Ledger
    from data_pipeline.report import planned
    from data_pipeline.sources import open_sources

    world = nproc or _launched_processes() or smallest_world(config.parallel)
    layout = config.layout(world)
    sources = open_sources(config.mixture, vocab_size=config.model.vocab_size)
    ledger = Ledger.start(config.mixture, sources)
    print(config.to_yaml())
    for line in [*model_lines(config), *run_lines(config, layout)]:
        print(line)
    print()
    print(planned(ledger))
    print("\ndry run: everything fits, nothing was started")


def model_lines(config: RunConfig) -> list[str]:
    """Parameters and operations of the model, a line each."""
    model, length = config.model, config.mixture.sequence_length
    total, active = model.num_parameters(), model.num_active_parameters()
    flops = model.flops_per_token(length)
    return [
        f"model       {total:,} parameters, {active:,} active for a token ({100 * active / total:.1f}%)",
        f"            {format_count(flops)} floating-point operations a token of training at sequence length {length}",
    ]


def run_lines(config: RunConfig, layout: Layout) -> list[str]:
    """Layout, batch and length of the run, a line each."""
    training, length = config.training, config.mixture.sequence_length
    accumulation = training.global_batch_size // (training.micro_batch_size * layout.data)
    lines = [
        f"layout      {layout.describe()}",
        f"batch       {training.global_batch_size} sequences of {length} tokens ({format_count(config.tokens_per_step)} tokens a step):"
        f" {accumulation} micro-batch(es) of {training.micro_batch_size} on each of {layout.data} data rank(s)",
        f"run         {format_count(config.total_tokens)} tokens in {_steps(config)}",
        f"operations  {config.model.flops_per_token(length) * config.total_tokens:.3g} for all tokens",
    ]
    schedule = config.schedule
    rate = f"schedule    {schedule.kind}, lr {config.optimizer.lr:g}, warm-up {schedule.warmup}"
    return [*lines, rate + (f", decay {schedule.decay} ({schedule.decay_form})" if schedule.kind == "wsd" else "")]


def _steps(config: RunConfig) -> str:
    """The number of steps in words; with a batch that grows it is counted batch by batch."""
    samples, length, steps, seen = config.total_tokens // config.mixture.sequence_length, config.mixture.sequence_length, 0, 0
    training = config.training
    while training.batch_size_warmup and seen * length < training.batch_size_warmup.tokens and seen < samples:
        seen += training.batch_size(seen * length)
        steps += 1
    steps += max(0, samples - seen) // training.global_batch_size
    if training.max_steps is not None and training.max_steps < steps:
        return f"{steps} steps, stopped after {training.max_steps} (training.max_steps)"
    return f"{steps} steps"


def _launched_processes() -> int | None:
    """What torchrun or srun says about the number of processes; None on a plain command line."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None
