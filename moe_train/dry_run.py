"""`moe-train pretrain --dry-run`: all that can be checked before a GPU is asked for. Needs no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from data_pipeline.units import format_count
from parallel.layout import Layout, smallest_world

if TYPE_CHECKING:
    from data_pipeline.ledger import Ledger
    from moe_train.config import RunConfig


def dry_run(config: RunConfig, nproc: int | None = None, resume: str = "auto") -> None:
    """Print config, model, layout and mixture of `config` for `nproc` processes, and start nothing.

    Without `nproc` the number of processes is the launcher's (torchrun, Slurm), else the fewest that the
    layout takes.

    Raises what `pretrain` would raise: a layout that does not divide, a missing corpus, a source whose epochs
    run out.
    """
    from moe_train.training.preflight import check_mixture, check_run, without_heldout

    world = nproc or _launched_processes() or smallest_world(config.parallel)
    layout = config.layout(world)
    changes = check_run(config, world, resume)
    ledger = check_mixture(config, resume)
    print(config.to_yaml())
    for line in [*model_lines(config), *run_lines(config, layout)]:
        print(line)
    for change in changes:
        print(f"changed     {change}, since the last start")
    if gap := without_heldout(config):
        print(f"warning: {gap}")
    print()
    print(_mixture(config, ledger))
    print("\ndry run: config, mixture and layout agree; nothing was started")


def model_lines(config: RunConfig) -> list[str]:
    """Parameters and operations of the model, a line each."""
    model, length = config.model, config.mixture.sequence_length
    total, active = model.num_parameters(), model.num_active_parameters()
    flops = model.flops_per_token(length)
    lines = [
        f"model       {total:,} parameters, {active:,} active for a token ({100 * active / total:.1f}%)",
        f"            {format_count(flops)} operations a token of training, at length {length}",
    ]
    if model.depth is not None:
        least = format_count(model.flops_per_token(length, through=0.0))
        gated = f"{len(model.gated_layers)} of {model.num_layers}"
        lines.append(f"            {least} where it passes every gated layer by ({gated})")
    return lines


def run_lines(config: RunConfig, layout: Layout) -> list[str]:
    """Layout, batch, length and schedule of the run, a line each."""
    training, schedule, length = config.training, config.schedule, config.mixture.sequence_length
    micro_batches = training.global_batch_size // (training.micro_batch_size * layout.data)
    total = config.total_tokens
    batch = f"{training.global_batch_size} sequences of {length} = {format_count(config.tokens_per_step)} tokens"
    rate = f"{schedule.kind}, lr {config.optimizer.lr:g}, warm-up {schedule.warmup}"
    if schedule.kind == "wsd":
        rate += f", decay {schedule.decay} ({schedule.decay_form})"
    return [
        f"layout      {layout.describe()}",
        f"batch       {batch} a step: {micro_batches} x {training.micro_batch_size} on each data rank",
        f"run         {format_count(total)} tokens in {_steps(config)}",
        f"            {config.model.flops_per_token(length) * total:.3g} operations in all",
        f"schedule    {rate}",
    ]


def _mixture(config: RunConfig, ledger: Ledger | None) -> str:
    """What the run is fed. Without its ledger: what a new run would be fed, whose faults need not be its own."""
    from data_pipeline.errors import DataError
    from data_pipeline.report import plan, planned

    if ledger is not None:
        return planned(ledger)
    try:
        new = planned(plan(config.mixture, config.model.vocab_size))
    except DataError as error:
        new = f"warning: {error}"
    return f"what this run was fed so far is found out when it starts; a new one:\n{new}"


def _steps(config: RunConfig) -> str:
    """The number of steps in words; a batch that grows is counted batch by batch."""
    training, mixture = config.training, config.mixture
    unlimited = training.model_copy(update={"max_steps": None})
    steps, _ = unlimited.end(mixture.num_samples, mixture.sequence_length)
    if training.max_steps is not None and training.max_steps < steps:
        return f"{steps:,} steps, stopped after {training.max_steps:,} (training.max_steps)"
    return f"{steps:,} steps"


def _launched_processes() -> int | None:
    """What torchrun or srun says about the number of processes; None on a plain command line."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None
