"""One rank's part of a run, put together: engine, model, optimizer, data, and where the run stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.heldout import open_heldout
from data_pipeline.ledger import Ledger
from data_pipeline.loader import Loader
from data_pipeline.stream import SampleStream
from moe_train.checkpoint.folder import read_run_state, step_of
from moe_train.checkpoint.load import (
    check_same_model,
    find_checkpoint,
    initialize_from,
    load_checkpoint,
)
from moe_train.checkpoint.mirror import open_mirror
from moe_train.config import RunConfig
from moe_train.model.build import DTYPES, build_model
from moe_train.model.options import ModelOptions
from moe_train.training.adaptive import AdaptiveCoefficients
from moe_train.training.depth_monitor import DepthMonitor
from moe_train.training.faults import FaultGuard
from moe_train.training.optimizer import Optimizer, wrap_data_parallel
from moe_train.training.preflight import open_corpora
from moe_train.training.router_monitor import RouterMonitor
from moe_train.training.run_folder import RunFolder
from moe_train.training.schedule import LearningRate
from moe_train.training.step import Stepper
from moe_train.training.validation import Validation
from parallel.topology import Topology
from parallel.transformer_engine import choose_kernels


def to_device(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device``; from pinned memory the host does not wait for what a GPU still has to do before it."""
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)


@dataclass
class Position:
    """Where a run stands: everything else follows from the config and the ledger."""

    step: int = 0
    samples: int = 0

    def tokens(self, sequence_length: int) -> int:
        return self.samples * sequence_length


class Trainer:
    """Builds what one rank needs and brings it to where the run stands.

    Args:
        config: the resolved run.
        topology: this rank's place.
        resume: ``auto``, ``never`` or the path of a checkpoint.

    Attributes:
        resumed_from: the checkpoint that was loaded, or None.
        previous_state: the run state of that checkpoint (empty without one).
    """

    def __init__(self, config: RunConfig, topology: Topology, resume: str):
        self.config, self.topology = config, topology
        self.folder = RunFolder(config.output_dir)
        self.position = Position()
        self.guard = FaultGuard(config.faults)
        self._build_model()
        self._load(resume)
        self._open_data()

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.position.tokens(self.sequence_length)

    @property
    def sequence_length(self) -> int:
        return self.config.mixture.sequence_length

    def next_batch_size(self) -> int:
        """Sequences of the next optimizer step."""
        return self.config.training.batch_size(self.tokens)

    @property
    def last_token(self) -> int:
        """Tokens seen when the run is complete: at the end of the mixture, or at ``max_steps`` if that comes first."""
        position = self.position
        _, samples = self.config.training.end(
            self.stream.num_samples, self.sequence_length, position.step, position.samples
        )
        return samples * self.sequence_length

    @property
    def complete(self) -> bool:
        """Whether there is no whole batch left, or ``max_steps`` is reached."""
        limit = self.config.training.max_steps
        if limit is not None and self.position.step >= limit:
            return True
        return self.position.samples + self.next_batch_size() > self.stream.num_samples

    @property
    def needs_tokens(self) -> bool:
        """Whether this rank looks at token ids: the ends of the pipeline embed and predict them; with a document mask
        every stage must know where documents start."""
        ends = self.topology.pipeline_rank == 0 or self.topology.is_last_pipeline_rank
        return ends or self.config.document_end is not None

    def read_micro_batches(self) -> list[torch.Tensor]:
        """This data rank's micro-batches of the next step, ``[micro_batch_size, S + 1]`` each; zeros where no token is
        needed, and none is read."""
        training = self.config.training
        count = self.next_batch_size() // (training.micro_batch_size * self.topology.layout.data)
        if self.loader is None:
            return [self.unread] * count
        return [to_device(torch.from_numpy(next(self.loader)), self.topology.device) for _ in range(count)]

    def run_state(self) -> dict:
        """What a checkpoint keeps beside the tensors."""
        return {
            "step": self.position.step,
            "samples": self.position.samples,
            "tokens": self.tokens,
            "ledger": self.ledger.to_dict(),
            "faults": self.guard.state(),
            "load_balancing_coefs": self.coefficients.values,
            "precision": self.config.training.precision,
            "starts": self.folder.starts,
        }

    def skip(self, first: int, last: int) -> None:
        """Record that the samples [first, last) were read but not learnt from."""
        self.ledger = self.ledger.skip(first, last)

    def rewind(self, last: int) -> tuple[Path, int] | None:
        """Take weights and optimizer back to the run's newest checkpoint, before the first save to the one that it was
        resumed from, wherever that lies, and pass over the samples from there to ``last``.

        Steps and samples go on counting: what was computed since the checkpoint is given up, not repeated. Returns the
        checkpoint and its number of samples; None, and nothing is done, where there is no checkpoint yet. No save may
        be in flight.
        """
        checkpoint = find_checkpoint(self.folder.checkpoints, "auto", self.topology, self.mirror)
        if self.resumed_from and (checkpoint is None or step_of(checkpoint) < self.previous_state["step"]):
            checkpoint = self.resumed_from
        if checkpoint is None:
            return None
        state = load_checkpoint(checkpoint, self.model, self.optimizer, self.topology)
        self.guard.rewind(state["faults"])
        self.coefficients.restore(state.get("load_balancing_coefs", {}))
        self.skip(state["samples"], last)
        return checkpoint, state["samples"]

    def close(self) -> None:
        """End the reading thread."""
        if self.loader is not None:
            self.loader.close()

    # ---- building

    def _build_model(self) -> None:
        training = self.config.training
        dtype = DTYPES[training.precision]
        recipe = training.fp8_recipe if training.precision == "fp8" else None
        options = ModelOptions(
            dtype=dtype,
            seed=training.seed,
            recompute=training.recompute,
            sharded_attention=self.config.parallel.attention_experts == "sharded",
            document_end=self.config.document_end,
            dispatcher=self.config.parallel.dispatcher,
            in_turn=self.config.parallel.in_turn,
            kernels=choose_kernels(training.kernels, recipe),
            fp8_recipe=recipe,
        )
        self.model = build_model(self.config.model, self.topology, options)
        self.monitor = RouterMonitor(self.model, self.topology, self.config.logging.router_gates)
        self.depths = DepthMonitor(self.model, self.topology)
        self.coefficients = AdaptiveCoefficients(self.model)
        wrapped = wrap_data_parallel(self.model, overlap=self.topology.device.type == "cuda")
        self.optimizer = Optimizer(wrapped, self.config.optimizer, bf16=dtype == torch.bfloat16)
        length, in_turn = self.config.mixture.sequence_length, self.config.parallel.in_turn
        self.stepper = Stepper(wrapped, self.topology, length, training.micro_batch_size, in_turn)

    def _load(self, resume: str) -> None:
        self.previous_state: dict = {}
        self.resumed_from: Path | None = None
        # Copies are made, and fetched, by rank 0.
        self.mirror = open_mirror(self.config.checkpoint, self.folder.path) if self.topology.rank == 0 else None
        if resume != "never":
            self.resumed_from = find_checkpoint(self.folder.checkpoints, resume, self.topology, self.mirror)
        if self.resumed_from is not None:
            check_same_model(read_run_state(self.resumed_from), self.config.model)
            self.previous_state = load_checkpoint(self.resumed_from, self.model, self.optimizer, self.topology)
            self.position = Position(self.previous_state["step"], self.previous_state["samples"])
            self.guard.restore(self.previous_state["faults"])
            self.coefficients.restore(self.previous_state.get("load_balancing_coefs", {}))
        elif self.config.checkpoint.initialize_from is not None:
            initialize_from(self.config.checkpoint.initialize_from, self.model, self.config.model, self.topology)
            self.optimizer.reload_main_parameters()

    def _open_data(self) -> None:
        config, mixture = self.config, self.config.mixture
        before = Ledger.from_json(self.previous_state["ledger"]) if self.previous_state else None
        sources = open_corpora(config, before)
        if before is not None:
            self.ledger = before.resume(mixture, sources, self.position.samples)
        else:
            self.ledger = Ledger.start(mixture, sources)
        self.stream = SampleStream(self.ledger, sources)
        self.loader = None
        if self.needs_tokens:
            self.loader = Loader(
                self.stream,
                self.position.samples,
                lambda samples: config.training.batch_size(samples * mixture.sequence_length),
                config.training.micro_batch_size,
                self.topology.data_rank,
                self.topology.layout.data,
            )
        shape = config.training.micro_batch_size, mixture.sequence_length + 1
        self.unread = torch.zeros(shape, dtype=torch.int64, device=self.topology.device)
        self.schedule = LearningRate(
            config.schedule,
            config.optimizer.lr,
            self.stream.num_samples * mixture.sequence_length,
            config.tokens_per_step,
        )
        self.validation = None
        if config.data.validation is not None:
            heldout = open_heldout(mixture, config.model.vocab_size)
            self.validation = Validation(heldout, config.data.validation.samples, self.stepper, self.topology)
