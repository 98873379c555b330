"""What the backward pass keeps of a micro-batch, tensor by tensor, and what lives only for a moment.

Counted from `moe_train.model`: which tensor each operation saves. T tokens of a micro-batch on this tensor
rank, R rows that its experts receive (T * top_k when routing is balanced), p bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.model.config import ModelConfig
from parallel.layout import Layout

LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Of `moe_train.model.head`: logits exist for a chunk of tokens at a time."""


@dataclass(frozen=True)
class Workload:
    """What goes through a rank at a time, in the terms of this module's formulas: a micro-batch, or the ``in_turn``
    that take turns (`parallel.overlap_dispatch`), which count as one here."""

    model: ModelConfig
    layout: Layout
    sequence_length: int
    micro_batch_size: int
    element: int
    """Bytes of an activation's element (2 for bf16, 4 for fp32)."""
    sharded_attention: bool = True
    dispatcher: str = "alltoall"
    in_turn: int = 1
    document_mask: bool = False

    @property
    def padded_length(self) -> int:
        """Positions of a sequence, padded to a multiple of the tensor ranks."""
        return -(-self.sequence_length // self.layout.tensor) * self.layout.tensor

    @property
    def whole(self) -> int:
        """Tokens of the micro-batch, padding included."""
        return self.padded_length * self.micro_batch_size * self.in_turn

    def count(self, global_batch_size: int) -> int:
        """How many there are in a step, for one data rank."""
        return global_batch_size // (self.micro_batch_size * self.in_turn * self.layout.data)

    @property
    def tokens(self) -> int:
        """T: tokens of the micro-batch on this tensor rank, outside of the attention itself."""
        return self.whole // self.layout.tensor

    def rows(self, part: str, worst: bool = False) -> int:
        """R of the experts of ``attention`` or ``mlp``; at worst every token of the expert group chooses
        here. T where there are no experts."""
        config = getattr(self.model, part)
        if not config.num_experts:
            return self.tokens
        ranks = self.layout.expert if part == "mlp" or self.sharded_attention else 1
        if worst:
            return self.tokens * ranks * min(config.top_k, config.num_experts // ranks)
        return self.tokens * config.top_k


def layer_bytes(work: Workload, recompute: str = "none", worst: bool = False, gated: bool = False) -> int:
    """Bytes that one layer keeps of one micro-batch from its forward to its backward pass; a gated one with all tokens
    going through it."""
    hidden = work.model.hidden_size
    if recompute == "full":
        return work.tokens * hidden * work.element
    inner = 0 if recompute == "selective" else mlp_inner_bytes(work, worst)
    attention, mlp = _ATTENTION[work.model.attention.kind], _MLP[work.model.mlp.kind]
    return 2 * _norm(work) + attention(work, worst) + mlp(work, worst) + inner + (_depth_gate(work) if gated else 0)


def _depth_gate(work: Workload) -> int:
    """Its input, what it weights, where the tokens go, and the mask of those that do."""
    places = work.tokens * (3 * work.model.hidden_size * work.element + 3 * work.element + 24) + work.whole * 16
    return places + mask_bytes(work)


def mask_bytes(work: Workload) -> int:
    """What keeps the documents of a micro-batch apart in the attention: one for all layers of a chunk, but for the
    gated ones, each of which has its own."""
    queries = work.whole * work.model.attention.queries_per_kv_head
    return queries * work.padded_length * work.element if work.document_mask else 0


def _norm(work: Workload) -> int:
    """The norm's input and output, and its scale."""
    return work.tokens * (2 * work.model.hidden_size * work.element + 4)


def _router(work: Workload, part: str) -> int:
    """Logits and probabilities, choice, gates and permutation."""
    config = getattr(work.model, part)
    return work.tokens * (2 * 4 * config.num_experts + 4 + config.top_k * (8 + 4 + work.element + 16))


def _mixture_of_attention(work: Workload, worst: bool) -> int:
    attention, ranks = work.model.attention, work.layout.tensor
    rows = work.rows("attention", worst)
    home = work.tokens * attention.top_k
    size = _router(work, "attention")
    size += rows * (work.model.hidden_size + attention.width) * work.element  # inputs of query and output experts
    size += home * work.model.hidden_size * work.element  # answers, before the gates
    size += work.whole * attention.width // ranks * (2 * attention.top_k + 3) * work.element  # q, o; k, and k with v
    return size + work.whole * attention.top_k * attention.num_kv_heads // ranks * 4  # log-sum-exp


def _grouped_query_attention(work: Workload, worst: bool) -> int:
    attention, tokens = work.model.attention, work.tokens  # all tokens, one tensor rank's part of the heads
    queries, keys = tokens * attention.width * work.element, tokens * attention.kv_width * work.element
    size = 2 * queries + 2 * keys + tokens * attention.num_heads * 4  # q, o; k, v; log-sum-exp
    return size + (queries + keys + 2 * 4 * work.whole if attention.qk_norm else 0)  # inputs and scales of the norms


def _mixture_of_mlp(work: Workload, worst: bool) -> int:
    """The router; inputs of the experts where they work, and their answers at home."""
    rows = work.rows("mlp", worst) + work.tokens * work.model.mlp.top_k
    return _router(work, "mlp") + rows * work.model.hidden_size * work.element


def _dense_mlp(work: Workload, worst: bool) -> int:
    return 0  # its input is the norm's output


_ATTENTION = {"mixture": _mixture_of_attention, "gqa": _grouped_query_attention}
_MLP = {"mixture": _mixture_of_mlp, "dense": _dense_mlp}
"""By kind: what is kept, but for the norm before it and what :func:`mlp_inner_bytes` counts."""


def mlp_inner_bytes(work: Workload, worst: bool = False) -> int:
    """What `recompute: selective` does not keep: gate, up and their product inside the MLPs."""
    widths = 3 if work.model.mlp.activation == "silu" else 4
    return work.rows("mlp", worst) * widths * work.model.mlp.ffn_hidden_size * work.element


def recomputed_bytes(work: Workload, recompute: str, worst: bool = False) -> int:
    """What comes back for a moment in the backward pass of one layer."""
    if recompute == "none":
        return 0
    if recompute == "selective":
        return mlp_inner_bytes(work, worst)
    whole = layer_bytes(work, "none", worst, gated=work.model.depth is not None)
    return whole - layer_bytes(work, "full", worst)


def head_bytes(work: Workload) -> int:
    """Of the last stage: the final norm's input and scale, and the gradients that the loss keeps at once."""
    hidden = work.model.hidden_size
    rows = -(-work.model.vocab_size // work.layout.tensor)
    tokens = work.tokens * (hidden * work.element + 4)
    return tokens + work.whole * hidden * work.element + rows * hidden * 4


def logits_bytes(work: Workload, device: str = "cuda") -> int:
    """The chunk of logits that exists at a time: in the model's precision, as gradient, and on a CPU in fp32, which
    compiled kernels need not write. Chunks are larger on GPUs."""
    rows = -(-work.model.vocab_size // work.layout.tensor)
    chunk = min(work.whole, max(64, LOGITS_PER_CHUNK[device] // rows))
    return chunk * rows * (2 * work.element + (4 if device == "cpu" else 0))


def dispatch_bytes(work: Workload, worst: bool = False) -> int:
    """Buffers of one exchange: what is sent, what is received (by all-gather the rows of every rank), and the received
    sorted by expert."""
    if work.layout.expert == 1:
        return 0
    attention, mlp, hidden = work.model.attention, work.model.mlp, work.model.hidden_size
    trips = []
    if mlp.num_experts:
        trips.append((work.rows("mlp", worst), work.tokens * mlp.top_k, hidden))
    if attention.num_experts and work.sharded_attention:
        home = work.tokens * attention.top_k
        trips.append((work.rows("attention", worst), home, max(hidden, attention.width)))
    gathered = work.layout.expert if work.dispatcher == "allgather" else 0
    return (
        max(((home + (gathered * home or rows) + rows) * width for rows, home, width in trips), default=0)
        * work.element
    )


def chunks_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Chunks' activations that a stage holds at most: 1F1B, or megatron-core's interleaved schedule."""
    virtual = layout.virtual_pipeline or 1
    if virtual == 1:
        return min(layout.pipeline - stage, micro_batches)
    warmup = (layout.pipeline - stage - 1) * 2 + (virtual - 1) * layout.pipeline
    return min(warmup + 1, micro_batches * virtual)


def stage_bytes(work: Workload, stage: int, micro_batches: int, recompute: str = "none", worst: bool = False) -> int:
    """Bytes of activations that a stage holds at its peak: all chunks in flight, then either the head's
    gradients (on the last stage) or what is recomputed of a layer."""
    layout = work.layout
    layers = work.model.num_layers // (layout.pipeline * (layout.virtual_pipeline or 1))
    gated = -(-layers // work.model.depth.every) if work.model.depth else 0
    flying = chunks_in_flight(layout, stage, micro_batches)
    size = flying * (layers - gated) * layer_bytes(work, recompute, worst)
    size += flying * gated * layer_bytes(work, recompute, worst, gated=True)
    size += flying * mask_bytes(work)
    if stage < layout.pipeline - 1:
        size += flying * work.tokens * work.model.hidden_size * work.element  # what was sent on
    head = head_bytes(work) if stage == layout.pipeline - 1 else 0
    return size + max(head, recomputed_bytes(work, recompute, worst))  # the head's are gone when layers come back
