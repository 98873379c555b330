"""What the backward pass keeps of a micro-batch, tensor by tensor, and what lives only for a moment.

Counted from `moe_train.model`: which tensor each operation saves. T tokens of a micro-batch on this tensor
rank, R rows that its experts receive (T * top_k when routing is balanced), p bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.model.config import ModelConfig
from parallel.layout import Layout

LOGITS_PER_CHUNK = 1 << 22
"""Of `moe_train.model.head`: logits exist for a chunk of tokens at a time."""


@dataclass(frozen=True)
class Workload:
    """One micro-batch on one rank, in the terms of this module's formulas."""

    model: ModelConfig
    layout: Layout
    sequence_length: int
    micro_batch_size: int
    element: int
    """Bytes of an activation's element (2 for bf16, 4 for fp32)."""
    sharded_attention: bool = True

    @property
    def whole(self) -> int:
        """Tokens of the micro-batch, sequences padded to a multiple of the tensor ranks."""
        return -(-self.sequence_length // self.layout.tensor) * self.layout.tensor * self.micro_batch_size

    @property
    def tokens(self) -> int:
        """T: tokens of the micro-batch on this tensor rank, outside of the attention itself."""
        return self.whole // self.layout.tensor

    def rows(self, part: str, worst: bool = False) -> int:
        """R of the experts of ``attention`` or ``mlp``; at worst every token of the expert group chooses
        here."""
        config = self.model.attention if part == "attention" else self.model.mlp
        ranks = self.layout.expert if part == "mlp" or self.sharded_attention else 1
        if worst:
            return self.tokens * ranks * min(config.top_k, config.num_experts // ranks)
        return self.tokens * config.top_k


def layer_bytes(work: Workload, recompute: str = "none", worst: bool = False) -> int:
    """Bytes that one layer keeps of one micro-batch from its forward to its backward pass."""
    hidden = work.model.hidden_size
    if recompute == "full":
        return work.tokens * hidden * work.element
    inner = 0 if recompute == "selective" else expert_inner_bytes(work, worst)
    return _attention(work, worst) + _router_and_norm(work, "mlp") + _mlp_rows(work, worst) + inner


def _router_and_norm(work: Workload, part: str) -> int:
    """The norm's input and output, its scale; the router's logits and probabilities, choice, gates and
    permutation."""
    config = work.model.attention if part == "attention" else work.model.mlp
    per_token = 2 * work.model.hidden_size * work.element + 4
    per_token += 2 * 4 * config.num_experts + 4
    per_token += config.top_k * (8 + 4 + work.element + 16)
    return work.tokens * per_token


def _attention(work: Workload, worst: bool) -> int:
    attention, ranks = work.model.attention, work.layout.tensor
    rows = work.rows("attention", worst)
    home = work.tokens * attention.top_k
    size = _router_and_norm(work, "attention")
    size += (
        rows * (work.model.hidden_size + attention.width) * work.element
    )  # inputs of query and output experts
    size += home * work.model.hidden_size * work.element  # answers, before the gates
    size += (
        work.whole * attention.width // ranks * (2 * attention.top_k + 3) * work.element
    )  # q, o; k, and k with v
    return size + work.whole * attention.top_k * attention.num_kv_heads // ranks * 4  # log-sum-exp


def _mlp_rows(work: Workload, worst: bool) -> int:
    """Inputs of the experts where they work, and their answers at home."""
    rows = work.rows("mlp", worst) + work.tokens * work.model.mlp.top_k
    return rows * work.model.hidden_size * work.element


def expert_inner_bytes(work: Workload, worst: bool = False) -> int:
    """What `recompute: selective` does not keep: gate, up and their product inside the MLP experts."""
    widths = 3 if work.model.mlp.activation == "silu" else 4
    return work.rows("mlp", worst) * widths * work.model.mlp.ffn_hidden_size * work.element


def recomputed_bytes(work: Workload, recompute: str, worst: bool = False) -> int:
    """What comes back for a moment in the backward pass of one layer."""
    if recompute == "none":
        return 0
    if recompute == "selective":
        return expert_inner_bytes(work, worst)
    return layer_bytes(work, "none", worst) - layer_bytes(work, "full", worst)


def head_bytes(work: Workload) -> int:
    """Of the last stage: the final norm's input and scale, and the gradients that the loss keeps at once."""
    hidden = work.model.hidden_size
    rows = -(-work.model.vocab_size // work.layout.tensor)
    tokens = work.tokens * (hidden * work.element + 4)
    return tokens + work.whole * hidden * work.element + rows * hidden * 4


def logits_bytes(work: Workload) -> int:
    """The chunk of logits that exists at a time: in the model's precision, in fp32 and as gradient."""
    rows = -(-work.model.vocab_size // work.layout.tensor)
    chunk = min(work.whole, max(64, LOGITS_PER_CHUNK // rows))
    return chunk * rows * (2 * work.element + 4)


def dispatch_bytes(work: Workload, worst: bool = False) -> int:
    """Buffers of one all-to-all: what is sent, what is received, and the received sorted by expert."""
    if work.layout.expert == 1:
        return 0
    trips = [(work.rows("mlp", worst), work.tokens * work.model.mlp.top_k, work.model.hidden_size)]
    if work.sharded_attention:
        width = max(work.model.hidden_size, work.model.attention.width)
        trips.append((work.rows("attention", worst), work.tokens * work.model.attention.top_k, width))
    return max((2 * rows + home) * width for rows, home, width in trips) * work.element


def chunks_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Chunks' activations that a stage holds at most: 1F1B, or megatron-core's interleaved schedule."""
    virtual = layout.virtual_pipeline or 1
    if virtual == 1:
        return min(layout.pipeline - stage, micro_batches)
    warmup = (layout.pipeline - stage - 1) * 2 + (virtual - 1) * layout.pipeline
    return min(warmup + 1, micro_batches * virtual)


def stage_bytes(
    work: Workload, stage: int, micro_batches: int, recompute: str = "none", worst: bool = False
) -> int:
    """Bytes of activations that a stage holds at its peak: all chunks in flight, then either the head's
    gradients (on the last stage) or what is recomputed of a layer."""
    layout = work.layout
    layers = work.model.num_layers // (layout.pipeline * (layout.virtual_pipeline or 1))
    flying = chunks_in_flight(layout, stage, micro_batches)
    size = flying * layers * layer_bytes(work, recompute, worst)
    if stage < layout.pipeline - 1:
        size += flying * work.tokens * work.model.hidden_size * work.element  # what was sent on
    head = head_bytes(work) if stage == layout.pipeline - 1 else 0
    return size + max(
        head, recomputed_bytes(work, recompute, worst)
    )  # the head's are gone when layers come back
