"""What a run leaves behind as it goes, written by rank 0 alone: metrics, events, console, trackers, ledger."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.errors import StoppedError
from moe_train.resume_rules import Change
from moe_train.training.console import Console
from moe_train.training.fence import Fence
from moe_train.training.preflight import without_heldout
from moe_train.training.slow_ranks import SlowRanks
from moe_train.training.throughput import Throughput
from moe_train.training.tracking import Trackers
from moe_train.training.trainer import Trainer
from parallel import engine
from parallel.spawn import rank_log_path

if TYPE_CHECKING:
    from moe_train.training.loop import StepFigures


class Recorder:
    """The written side of a run. On ranks other than 0 every method but :meth:`speed` does nothing.

    Args:
        trainer: the run, brought to where it goes on.
        changes: what differs from the config of the last start and is to be recorded.
        fence: this start's right to write the folder; known to rank 0.
    """

    def __init__(self, trainer: Trainer, changes: list[Change], fence: Fence | None = None):
        self.trainer, self.folder = trainer, trainer.folder
        config, topology = trainer.config, trainer.topology
        self.active, self._fence = topology.rank == 0, fence
        self._throughput = Throughput(topology.layout.world_size, engine.device_name())
        hosts = topology.gather(socket.gethostname())
        if not self.active:
            return
        self._slow_ranks = SlowRanks(hosts)
        # A folder without events is a new one in the place of one that is gone: its count goes on.
        new = not self.folder.events_path.exists()
        start = self.folder.start(config.to_yaml(), trainer.previous_state.get("starts", 0) if new else 0)
        self.total_tokens = trainer.last_token
        self.console = Console(self.total_tokens, rank_log_path(self.folder.logs, 0))
        self._metrics = self.folder.open_metrics(trainer.position.step)
        self._trackers = Trackers(
            config.logging,
            self.folder.path,
            config.model_dump(mode="json", by_alias=True),
            trainer.position.step,
            trainer.tokens,
            trainer.previous_state.get("trackers"),
            self.console.warn,
        )
        self._announce(start, changes)

    def speed(self, tokens: int, seconds: float, through: list[float]) -> dict[str, float | None]:
        """Tokens per second and what follows from it, for a step whose gated layers took the parts ``through`` of the
        tokens."""
        trainer = self.trainer
        flops = trainer.config.model.flops_per_token(trainer.sequence_length, through)
        return self._throughput.measure(tokens, seconds, flops)

    def step(self, line: dict[str, Any], figures: StepFigures) -> None:
        """Record a finished step; ``line`` has the keys of metrics.jsonl.

        Raises:
            FencedError: another start has taken the folder.
        """
        if not self.active:
            return
        if self._fence is not None:
            self._fence.check()
        due = "routers" in line
        self._slow_ranks.add(figures.rank_seconds)
        if due:
            line["rank_seconds"] = self._slow_ranks.report()
        before = self._metrics.failure
        self._metrics.append(line)
        if self._metrics.failure and not before:
            self.console.warn(
                f"{self.folder.metrics_path} cannot be written ({self._metrics.failure}): its lines wait in memory"
            )
        elif before and not self._metrics.failure:
            self.console.say(f"{self.folder.metrics_path} can be written again and has all its lines")
        self.console.step(line, due)
        if due:
            self.console.health(line["step"], {**figures.depths, **line["routers"]})
            if warning := self._slow_ranks.warning(line["rank_seconds"]):
                self.console.warn(warning)
                self.folder.event("slow_rank", line["step"], **line["rank_seconds"])
        scores = {name: value for name, value in line.items() if name.startswith("validation/")}
        if scores:
            self.console.say(
                f"  held-out at step {line['step']}: "
                + ", ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in scores.items())
            )
        if due or scores:
            self._trackers.log(line)

    def gave_up(self, step: int, fault: str, first: int, last: int, checkpoint: Path | None = None) -> None:
        """Record an update that was not made, or those since ``checkpoint`` that are undone: nothing is learnt from the
        samples [first, last)."""
        if not self.active:
            return
        count = self.trainer.guard.skips
        details = {"reason": fault, "first_sample": first, "samples": last - first, "count": count}
        if checkpoint is None:
            done = "update skipped"
            self.folder.event("skip", step, **details)
        else:
            done = f"went back to {checkpoint.name}, past samples {first} to {last - 1}"
            self.folder.event("rewind", step, **details, checkpoint=str(checkpoint))
        try:
            self.folder.write_ledger(self.trainer.ledger.to_dict())
        except OSError as error:  # every checkpoint has it too
            self.console.warn(f"{self.folder.ledger_path} cannot be written ({error.strerror})")
        self.console.warn(f"step {step}: {fault}; {done} ({count} of this run so far)")

    def stopping(self, reason: str) -> None:
        """Record what the ranks have agreed to stop for."""
        if self.active:
            self.folder.event("stop", self.trainer.position.step, reason=reason)

    def warn(self, text: str) -> None:
        """Say and record that something went wrong that the run survives."""
        if self.active:
            self.console.warn(text)
            self.folder.event("warning", self.trainer.position.step, text=text)

    def saved(self, checkpoint: Path) -> None:
        """Record a checkpoint that is on disk."""
        if self.active:
            self.folder.event("save", int(checkpoint.name.removeprefix("iter_")), checkpoint=str(checkpoint))

    def fp8(self, products: int, total: int) -> None:
        """Record how many of Transformer Engine's matrix products of the first step, over all ranks, ran in FP8."""
        if self.active:
            recipe = self.trainer.config.training.fp8_recipe
            text = f"FP8, {recipe}: {products:,} of {total:,} matrix products in the first step, routers and head apart"
            self.console.say(text)
            self.folder.event("fp8", self.trainer.position.step, products=products, total=total)

    def before_save(self) -> None:
        """Bring to the disk what a checkpoint takes for granted."""
        if self.active:
            self._metrics.sync()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the trackers (known to rank 0, which writes it)."""
        return {"trackers": self._trackers.state()} if self.active else {}

    def finish(self, code: int, reason: str) -> None:
        """Leave outcome.json and close everything: in this order, for a tracker without a network may take its time."""
        if self.active:
            self.folder.finish(code, reason, self.trainer.position.step)
        self.close(code, reason)

    def close(self, code: int, reason: str) -> None:
        """Say why it ends and close everything; no outcome is written: the folder may be another start's by now."""
        if not self.active:
            return
        self.console.summary(reason, {"metrics": self.folder.metrics_path, "checkpoints": self.folder.checkpoints})
        if code == StoppedError.exit_code:
            self.console.say("  it is saved: start it again to go on")
        self._metrics.close()
        self._trackers.close(code)
        self.console.close()

    def _announce(self, start: int, changes: list[Change]) -> None:
        trainer, say = self.trainer, self.console.say
        config, position = trainer.config, trainer.position
        say(
            f"{config.output_dir}: start {start}, {trainer.topology.layout.describe()}, {config.training.precision} on "
            f"{engine.device_name()}"
        )
        say(f"model: {config.model.num_parameters():,} parameters, {config.model.num_active_parameters():,} active")
        if trainer.resumed_from is not None:
            say(
                f"resumed from {trainer.resumed_from} at step {position.step}, {trainer.tokens:,} of "
                f"{self.total_tokens:,} tokens"
            )
            self.folder.event("resume", position.step, checkpoint=str(trainer.resumed_from))
        previous = self._fence.previous if self._fence else None
        if previous and previous.may_be_alive():
            say(f"taking over from {previous.describe()}, which may still run and will end")
            self.folder.event("takeover", position.step, previous=previous.describe())
        for change in changes:
            say(f"changed since the last start: {change}")
            self.folder.event("change", position.step, key=change.key, old=change.old, new=change.new)
        if trainer.validation and (gap := without_heldout(config, trainer.validation.windows)):
            self.console.warn(gap)
        ledger = trainer.ledger.to_dict()
        if trainer.previous_state and ledger != trainer.previous_state["ledger"]:
            say("the mixture was edited: its new form counts from here on")
            self.folder.event("mixture", position.step, first_sample=position.samples)
        self.folder.write_ledger(ledger)
