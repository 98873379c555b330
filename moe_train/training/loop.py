"""The training loop. Reads top to bottom: data, gradients, judgement, update, record, validate, save, stop."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from moe_train.checkpoint.save import Checkpointer
from moe_train.training.depth_monitor import mean_through, parts_through
from moe_train.training.expert_similarity import expert_similarities
from moe_train.training.faults import Fault
from moe_train.training.fp8 import proven_fp8
from moe_train.training.recorder import Recorder
from moe_train.training.replicas import check_replicas
from moe_train.training.signals import StopRequest
from moe_train.training.trainer import Trainer
from moe_train.training.watchdog import Watchdog
from moe_train.units import Duration


@dataclass(frozen=True)
class StepFigures:
    """What the ranks agree on after forward and backward; losses are means over the global batch."""

    loss: float
    load_balancing_loss: float
    z_loss: float
    gradient_norm: float
    routers: dict[str, dict[str, float]]
    drop_rates: dict[str, float]
    depths: dict[str, dict[str, float]]
    rank_seconds: list[float]
    stop: bool


def train(
    trainer: Trainer, recorder: Recorder, checkpointer: Checkpointer, stop: StopRequest, watchdog: Watchdog
) -> str | None:
    """Train until the mixture ends, ``max_steps`` is reached, or a stop is asked for.

    Returns None when the run is complete, else why it stopped; in both cases the last step is saved.
    """
    config = trainer.config
    reason = None
    watchdog.arm("the first step", 2 * config.faults.step_timeout)
    proof = proven_fp8(trainer.topology, recorder) if config.training.precision == "fp8" else nullcontext()
    while not trainer.complete:
        began = time.perf_counter()
        position, tokens = trainer.position, trainer.tokens
        batch_size = trainer.next_batch_size()
        step, lr, phase = position.step + 1, trainer.schedule(tokens), trainer.stream.phase_at(position.samples)

        with proof:
            figures = _gradients(trainer, batch_size, stop)
        proof = nullcontext()
        segment = trainer.ledger.segment_at(position.samples)
        fault = trainer.guard.judge(step, figures.loss, figures.gradient_norm, segment)
        if fault is None:
            trainer.optimizer.update(lr, figures.gradient_norm)
            trainer.coefficients.update(figures.drop_rates)
        else:
            with watchdog.allow(10 * config.faults.step_timeout, "going back to a checkpoint"):
                _give_up(fault, trainer, recorder, checkpointer, step, position.samples + batch_size)
        position.step, position.samples = step, position.samples + batch_size
        if _due(config.faults.check_replicas, step, tokens, trainer.tokens):
            trainer.optimizer.gather_weights()
            check_replicas(trainer.model, trainer.topology)

        line = {
            "step": step,
            "tokens": trainer.tokens,
            "phase": phase,
            "loss": figures.loss,
            "load_balancing_loss": figures.load_balancing_loss,
            "z_loss": figures.z_loss,
            **({"depth": mean_through(figures.depths)} if figures.depths else {}),
            "grad_norm": figures.gradient_norm,
            "lr": lr,
            **recorder.speed(trainer.tokens - tokens, time.perf_counter() - began, parts_through(figures.depths)),
        }
        if compared := _due(config.logging.expert_similarity, step, tokens, trainer.tokens):
            trainer.optimizer.gather_weights()
            for name, similarity in expert_similarities(trainer.model, trainer.topology).items():
                figures.routers[name]["similarity"] = similarity
        if compared or _due(config.logging.interval, step, tokens, trainer.tokens):
            line["routers"] = figures.routers
            line |= {"depths": figures.depths} if figures.depths else {}
        if trainer.validation and _due(config.data.validation.interval, step, tokens, trainer.tokens, trainer.complete):
            with watchdog.allow(10 * config.faults.step_timeout, "validation"):
                line.update(trainer.validation.run())
        recorder.step(line, figures)

        if figures.stop:
            reason = _agreed_reason(trainer, stop)
            recorder.stopping(reason)
        if reason or _due(config.checkpoint.interval, step, tokens, trainer.tokens, trainer.complete):
            with watchdog.allow(10 * config.faults.step_timeout, "a checkpoint"):
                recorder.before_save()
                checkpointer.save(step, {**trainer.run_state(), **recorder.state()})
        if reason:
            break
        watchdog.feed(f"step {step + 1}")
    patience = 10 * config.faults.step_timeout
    with watchdog.allow(patience, "the last checkpoint"):
        checkpointer.finish(lambda: watchdog.arm("the last copy of a checkpoint", patience))
    watchdog.disarm()
    return reason


def _give_up(
    fault: Fault, trainer: Trainer, recorder: Recorder, checkpointer: Checkpointer, step: int, last: int
) -> None:
    """Leave out the update of ``step``, whose samples end before ``last``, or also those since the last checkpoint."""
    if fault.action == "rewind":
        checkpointer.wait()  # which checkpoint is the last one must not depend on how fast it is written
        if (found := trainer.rewind(last)) is not None:
            recorder.gave_up(step, fault.text, found[1], last, found[0])
            return
    trainer.skip(trainer.position.samples, last)
    recorder.gave_up(step, fault.text, trainer.position.samples, last)


def _gradients(trainer: Trainer, batch_size: int, stop: StopRequest) -> StepFigures:
    """Forward and backward of one global batch, and one sum over all ranks of everything that is to be known of it."""
    topology, layout = trainer.topology, trainer.topology.layout
    count = batch_size // trainer.config.training.micro_batch_size
    trainer.optimizer.zero_grad()
    trainer.monitor.reset()
    trainer.depths.reset()
    trainer.stepper.clock.start()
    loss = trainer.stepper.train(trainer.read_micro_batches())
    norm = trainer.optimizer.gradient_norm()
    seconds = [0.0] * layout.world_size
    seconds[topology.rank] = trainer.stepper.clock.seconds()
    own = [loss / layout.tensor, float(stop.reason() is not None), *seconds]
    parts = [torch.tensor(own, dtype=torch.float64, device=topology.device)]
    parts += [trainer.monitor.totals, trainer.depths.totals]
    totals = topology.sum_over_world(torch.cat(parts)).cpu()  # at once: every figure is read below
    (loss, stops, *seconds), routers, depths = totals.split([len(part) for part in parts])
    balance, z = trainer.monitor.losses(routers, count)
    by_router = trainer.monitor.figures(routers)
    for name, coefficient in trainer.coefficients.values.items():
        by_router[name]["load_balancing_coef"] = coefficient
    return StepFigures(
        loss=float(loss) / count,
        load_balancing_loss=balance,
        z_loss=z,
        gradient_norm=norm,
        routers=by_router,
        drop_rates=trainer.monitor.drop_rates(routers),
        depths=trainer.depths.figures(depths, batch_size * trainer.sequence_length),
        rank_seconds=[float(each) for each in seconds],
        stop=bool(stops > 0),
    )


def _agreed_reason(trainer: Trainer, stop: StopRequest) -> str:
    """The first rank's reason to stop; one of them has one."""
    return next(reason for reason in trainer.topology.gather(stop.reason()) if reason)


def _due(interval: Duration | None, step: int, before: int, after: int, last: bool = False) -> bool:
    """Whether ``interval`` (steps, or tokens) ends with this step, which took the run from ``before`` to ``after``
    tokens."""
    if interval is None:
        return False
    if last:
        return True
    if interval.steps is not None:
        return step % interval.steps == 0
    return after // interval.tokens > before // interval.tokens
