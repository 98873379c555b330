"""A model of the time of one optimizer step: what is computed, what is sent, what waits.

    step = (micro-batches + bubble) * (compute + exchanges of one micro-batch) + reduction + gather + update

Compute is operations over ``peak * compute_efficiency``: that efficiency is the one number that
`--calibrate` fits. Or it is what a measured step of one GPU says. Exchanges inside of layers (tensor, expert) wait:
what `parallel.overlap_dispatch` hides of them is not counted. The reduction of gradients hides behind the backward pass
of the last micro-batch as far as it can; the gather of the weights and the update do not. Routing is taken as balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_train.model.config import ModelConfig
from moe_train.plan.activations import Workload
from moe_train.plan.hardware import Hardware
from moe_train.plan.measured import MeasuredStep
from moe_train.plan.shards import Buffer

UPDATE_BYTES = 34
"""Read and written by AdamW for an element: gradient, main copy, two moments (4 bytes each, all but the
gradient twice) and the bf16 weight, with the read of the gradient for its norm."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; `traffic` is bytes that one GPU sends for each kind in a step."""

    seconds: float
    compute: float
    bubble: float
    tensor: float
    expert: float
    pipeline: float
    data: float
    update: float
    traffic: dict[str, float]


def forward_flops(work: Workload, head: bool, layers: int) -> float:
    """Operations of the forward pass of one micro-batch through some layers, and the head, on one tensor
    rank."""
    model, length = work.model, work.sequence_length
    layer = model.attention.multiply_adds(model.hidden_size, length) + model.mlp.multiply_adds(model.hidden_size)
    per_token = 2.0 * (layers * layer + (model.vocab_size * model.hidden_size if head else 0))
    return per_token * work.whole / work.layout.tensor


def recomputed_flops(work: Workload, recompute: str, layers: int) -> float:
    """Forward operations that the backward pass repeats."""
    if recompute == "none":
        return 0.0
    if recompute == "full":
        return forward_flops(work, False, layers)
    return layers * 2.0 * 3 * work.model.hidden_size * work.model.mlp.active_width * work.tokens


def exchanged_bytes(work: Workload, recompute: str, layers: int) -> tuple[float, float]:
    """(tensor, expert): bytes that one GPU sends for one micro-batch, forward and backward.

    Tensor ranks gather the input of a column-parallel layer (and gather it again and scatter its gradient
    backward), and scatter the output of a row-parallel one (and gather its gradient); a mixture of attention
    trades sequence for heads instead. Expert ranks send and answer: MLP rows of width H; with sharded
    attention experts the query's (H there, D back) and the output's (D there, H back).
    """
    attention, mlp, hidden, layout = work.model.attention, work.model.mlp, work.model.hidden_size, work.layout
    again = 1.5 if recompute == "full" else 1.0  # a third trip each way where layers run twice
    tensor = expert = 0.0
    if layout.tensor > 1:
        away = (layout.tensor - 1) / layout.tensor
        tensor = away * (_ATTENTION_OVER_TENSOR_RANKS[attention.kind](work) + _MLP_OVER_TENSOR_RANKS[mlp.kind](work))
    if layout.expert > 1:
        away = layout.expert - 1  # how often a row is sent: to every other rank, or to one that is seldom this one
        if work.dispatcher != "allgather":
            away /= layout.expert
        if mlp.num_experts:
            expert = away * 4 * work.tokens * mlp.top_k * hidden
        if attention.num_experts and work.sharded_attention:
            expert += away * 4 * work.tokens * attention.top_k * (hidden + attention.width)
    return tensor * layers * work.element * again, expert * layers * work.element * again


def _column_and_row(work: Workload) -> int:
    return 5 * work.whole * work.model.hidden_size


def _mixture_of_attention(work: Workload) -> int:
    attention = work.model.attention
    return 3 * work.whole * work.model.hidden_size + 4 * work.tokens * attention.top_k * attention.width


_ATTENTION_OVER_TENSOR_RANKS = {"mixture": _mixture_of_attention, "gqa": _column_and_row}
_MLP_OVER_TENSOR_RANKS = {"mixture": lambda work: 0, "dense": _column_and_row}
"""By kind: elements that go through all tensor ranks for one layer of a micro-batch."""


def reduced_bytes(buffers: Sequence[tuple[Buffer, bool]]) -> tuple[float, float]:
    """(gradients reduce-scattered in fp32, weights gathered in bf16): bytes one GPU sends in a step."""
    away = sum(buffer.size * (buffer.ranks - 1) / buffer.ranks for buffer, _ in buffers)
    return 4 * away, 2 * away


def step_time(
    work: Workload,
    hardware: Hardware,
    buffers: Sequence[tuple[Buffer, bool]],
    micro_batches: int,
    recompute: str,
    measured: MeasuredStep | None = None,
) -> StepTime:
    """The expected time of a step whose slowest stage is the last one (it has the head as well).

    Args:
        buffers: those of the first stage, as `moe_train.plan.shards.buffers` gives them.
        micro_batches: of one data rank in a step.
        measured: what stands for computation and update, of this micro-batch size and recomputation; without tensor
            parallelism.
    """
    layout = work.layout
    virtual = layout.virtual_pipeline or 1
    layers = work.model.num_layers // layout.pipeline
    if measured is not None:
        compute = measured.compute(layers) * work.in_turn
    else:
        speed = hardware.peak_flops * hardware.compute_efficiency.value
        compute = (3 * forward_flops(work, True, layers) + recomputed_flops(work, recompute, layers)) / speed
    tensor_bytes, expert_bytes = exchanged_bytes(work, recompute, layers)
    tensor = tensor_bytes / hardware.bandwidth(layout.tensor)
    expert = expert_bytes / hardware.bandwidth(layout.expert)
    stage_ranks = layout.tensor * layout.data
    sent_on = 0.0
    if layout.pipeline > 1:
        sent_on = 2.0 * work.tokens * work.model.hidden_size * work.element * virtual
    pipeline = sent_on / hardware.bandwidth(stage_ranks + 1)
    once = compute + tensor + expert + pipeline
    bubble = (layout.pipeline - 1) / virtual * once
    reduced, gathered = reduced_bytes(buffers)
    link = hardware.bandwidth(stage_ranks)
    exposed = max(0.0, reduced / link - 2 / 3 * compute) + gathered / link
    owned = sum(buffer.size / buffer.ranks for buffer, _ in buffers)
    if measured is not None:
        update = measured.update(owned)
    else:
        update = owned * UPDATE_BYTES / (hardware.memory_bandwidth_gbs.value * 1e9)
    return StepTime(
        seconds=micro_batches * once + bubble + exposed + update,
        compute=micro_batches * compute,
        bubble=bubble,
        tensor=micro_batches * tensor,
        expert=micro_batches * expert,
        pipeline=micro_batches * pipeline,
        data=exposed,
        update=update,
        traffic={
            "tensor": micro_batches * tensor_bytes,
            "expert": micro_batches * expert_bytes,
            "pipeline": micro_batches * sent_on,
            "data": reduced + gathered,
        },
    )


def model_flops_utilisation(model: ModelConfig, sequence_length: int, rate_per_gpu: float, hardware: Hardware) -> float:
    """Part of the peak that goes into the operations the model needs (recomputation not counted)."""
    return model.flops_per_token(sequence_length) * rate_per_gpu / hardware.peak_flops
