"""The sections `training`, `optimizer`, `schedule`, `faults` and `logging` of a run file. Needs no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from moe_train.units import Count, Duration, DurationField, Interval, Seconds


class Section(BaseModel):
    """Strict, frozen, and without unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class BatchSizeWarmup(Section):
    """The global batch grows linearly with the tokens seen, in whole multiples of `start`.

    Multiples of `start`, not of what one step of all ranks holds: so that the batch of step n does not depend
    on the layout.
    """

    start: int = Field(ge=1)
    """Sequences of the first batches; divides the global batch, and is a multiple of micro_batch_size x
    data."""
    tokens: Count = Field(ge=1)
    """Tokens after which the batch is the full one."""

    def batch_size(self, tokens_seen: int, full: int) -> int:
        """Sequences of the next batch, where `full` is the global batch size."""
        if tokens_seen >= self.tokens:
            return full
        grown = self.start + (full - self.start) * tokens_seen // self.tokens
        return grown // self.start * self.start


class TrainingConfig(Section):
    """What is computed, and for how long."""

    micro_batch_size: int = Field(4, ge=1)
    """Sequences of one forward pass; also what the router losses are averaged over (`model.router.scope:
    micro_batch`)."""
    global_batch_size: int = Field(16, ge=1, validate_default=True)
    """Sequences of one optimizer step, over all ranks; a multiple of micro_batch_size x data."""
    batch_size_warmup: BatchSizeWarmup | None = None
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Of parameters and activations; the optimizer's are fp32. fp8: bf16, and the matrix products of experts and dense
    layers in FP8, on GPUs with Transformer Engine; routers, attention itself and head stay in bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 is scaled: by the largest values of the last 1,024 uses of each tensor, by its own largest value, by
    blocks of 1x128 and 128x128 (Hopper), or by blocks of 32 (Blackwell alone)."""
    kernels: Literal["torch", "transformer_engine"] | None = None
    """Whose layers the model is built from; null: Transformer Engine's on GPUs where it is installed, else torch's."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Of the initial weights; the order of the data has a seed of its own in the mixture file."""
    max_steps: Count | None = Field(None, ge=1)
    """Stop after this step, even if the mixture has more; null: the whole mixture."""
    max_wall_time: Seconds | None = None
    """Save and stop (status 3) when this much time has passed since the start."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none of them, those inside the MLP experts, whole
    layers."""
    deterministic: bool = False
    """On GPUs, only kernels that give the same bits each time (slower). On CPUs a run on one layout always
    does."""

    @field_validator("global_batch_size")
    @classmethod
    def _check_global_batch_size(cls, whole: int, info: ValidationInfo) -> int:
        micro = info.data.get("micro_batch_size", whole)  # absent when it was itself refused
        if whole % micro:
            near = max(micro, (whole + micro // 2) // micro * micro)
            raise ValueError(
                f"{whole} is not a multiple of micro_batch_size {micro}; the nearest that would do: {near}"
            )
        return whole

    @field_validator("batch_size_warmup")
    @classmethod
    def _check_batch_size_warmup(cls, warmup: BatchSizeWarmup | None, info: ValidationInfo) -> BatchSizeWarmup | None:
        micro, whole = info.data.get("micro_batch_size"), info.data.get("global_batch_size")
        if warmup and micro and whole and (whole % warmup.start or warmup.start % micro):
            raise ValueError(
                f"start {warmup.start} must divide global_batch_size {whole} and be a multiple of"
                f" micro_batch_size {micro}; the nearest that would do: {_nearest_start(warmup.start, micro, whole)}"
            )
        return warmup

    def batch_size(self, tokens_seen: int) -> int:
        """Sequences of the next optimizer step, after `tokens_seen` tokens."""
        warmup = self.batch_size_warmup
        return self.global_batch_size if warmup is None else warmup.batch_size(tokens_seen, self.global_batch_size)

    def end(self, num_samples: int, sequence_length: int, step: int = 0, samples: int = 0) -> tuple[int, int]:
        """(step, samples) at which a run is complete that stands at `step` and `samples` of a mixture of `num_samples`:
        no whole batch is left, or `max_steps` is reached."""
        limit = math.inf if self.max_steps is None else self.max_steps
        while step < limit:
            size, count = self.batch_size(samples * sequence_length), 1
            if size == self.global_batch_size:  # and so are all later ones
                count = max(1, min((num_samples - samples) // size, limit - step))
            if samples + count * size > num_samples:
                break
            step, samples = step + count, samples + count * size
        return step, samples


def _nearest_start(start: int, micro: int, whole: int) -> int:
    fitting = (size for size in range(micro, whole + 1, micro) if whole % size == 0)
    return min(fitting, key=lambda size: (abs(size - start), size))


class OptimizerConfig(Section):
    """AdamW. The defaults are the JetMoE paper's; it does not state betas and eps, these are the usual
    ones."""

    lr: float = Field(5.0e-4, gt=0)
    """The peak, which the schedule scales."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1.0e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only; norms and biases have none."""
    clip_grad: float | None = Field(1.0, gt=0)
    """The largest global norm of the gradient; null: no clipping."""
    offload: Literal["torch", "deepspeed"] | None = None
    """Keep the moments in host memory and update on the CPU, with torch's fused AdamW or DeepSpeed's CPU Adam:
    where the optimizer does not fit the GPU. null: on the device."""

    @field_validator("betas", mode="before")
    @classmethod
    def _read_betas(cls, value: object) -> object:
        """YAML has no tuples: a list of two numbers is meant."""
        if isinstance(value, list | tuple):
            if len(value) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value):
                raise ValueError(f"betas are two numbers, 0 <= beta < 1, such as [0.9, 0.95]; got {list(value)}")
            return tuple(float(beta) for beta in value)
        return value


class ScheduleConfig(Section):
    """The learning rate, in tokens: warm-up, then stable and decay (wsd), cosine, or constant. JetMoE paper,
    eq. 13."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: DurationField | None = None
    """null: 1% of the run."""
    warmup_init_ratio: float = Field(0.1, ge=0, le=1)
    """Where the warm-up starts, as a part of `lr` (JetMoE: 10%)."""
    decay: DurationField | None = None
    """The decay at the end of the run (wsd alone); null: 20% of it, as in the paper."""
    decay_form: Literal["exponential", "linear", "cosine", "1-sqrt"] = "exponential"
    """wsd alone; the paper leaves it open and cites MiniCPM, whose form is exponential."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where the decay ends, as a part of `lr`."""

    @field_validator("min_lr_ratio")
    @classmethod
    def _check_min_lr_ratio(cls, ratio: float, info: ValidationInfo) -> float:
        if ratio == 0 and info.data.get("kind") == "wsd" and info.data.get("decay_form") == "exponential":
            raise ValueError("an exponential decay never reaches 0; set it above 0, or decay_form: linear")
        return ratio

    def resolved(self, total_tokens: int, tokens_per_step: int) -> ScheduleConfig:
        """The same schedule with `warmup` and `decay` in tokens, for a run of `total_tokens`. Steps are those of the
        full batch as it is now: where a resume has another one, that this moves the schedule is told as a change."""
        warmup = self.warmup.in_tokens(tokens_per_step) if self.warmup else total_tokens // 100
        decay = self.decay.in_tokens(tokens_per_step) if self.decay else total_tokens // 5
        return self.model_copy(update={"warmup": Duration(tokens=warmup), "decay": Duration(tokens=decay)})


class FaultsConfig(Section):
    """What happens when a step goes wrong."""

    on_nonfinite: Literal["skip", "rewind", "stop"] = "skip"
    """A loss or gradient that is not finite: leave the step's update out; go back to the last checkpoint's weights
    and pass over the data since; or stop."""
    on_spike: Literal["skip", "rewind", "stop", "ignore"] = "skip"
    """A sudden jump of the loss or the gradient norm."""
    spike_deviations: float = Field(20.0, gt=0)
    """Standard deviations over the mean of the last 128 steps on the same phase of the same mixture from which on it is
    one. Gradient norms have long tails that clipping takes care of: 6 would leave out one update in a hundred of a
    small model."""
    max_skips: int = Field(20, ge=0)
    """How often a run may skip or rewind within 1,000 steps before it stops with status 6."""
    check_replicas: Interval | None = None
    """How often copies of one weight on several ranks are compared; null: never."""
    step_timeout: Seconds = 600.0
    """A step that takes longer is a hang: every rank's stack is written, status 5."""


class WandbConfig(Section):
    """Weights & Biases. One run id across restarts."""

    mode: Literal["online", "offline", "disabled"] | None = None
    """null: online where a key is set up, else offline (written to the run's folder, `wandb sync` sends it
    later)."""
    project: str = "moe-train"
    entity: str | None = None
    name: str | None = None
    """null: the name of the run's folder."""


class LoggingConfig(Section):
    """What is written besides metrics.jsonl, which has every step always."""

    interval: Interval = Duration(steps=10)
    """A line on the console, and a point for the trackers."""
    wandb: WandbConfig | None = None
    """null: not used."""
    tensorboard: bool = False
    router_gates: bool = False
    """Watch how sure the routers are: Max1/Max2 and Max2/Max3 of the gates, in the `routers` entry of metrics.jsonl."""
    expert_similarity: Interval | None = None
    """How often the mean cosine between the experts of each layer is measured, for the same entry; null: never."""
