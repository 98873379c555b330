"""Mixture of depths: layers that take some of the tokens and let the others pass by.

MoDification (arXiv 2410.14268): a token whose gate reaches a threshold goes through the layer, whose attention and MLP
count as much as the gate says; any other leaves it as it came, and is no key to the tokens that go through. What a
token does depends on nothing but itself, so that a model generates as it was trained. The loss ``coef * F * G`` of a
layer, F the part of the tokens that it takes and G their mean gate, pushes the gates down; it is averaged as a router's
losses are.

What goes through is gathered into fewer rows, so that a layer costs as much less. The host has to know how many they
are: one synchronisation for each gated layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moe_train.model.config import ModelConfig
from moe_train.model.documents import document_mask
from moe_train.model.options import ModelOptions
from moe_train.model.parameters import new_parameter, sequence_parallel
from moe_train.model.tokens import Tokens
from parallel.dispatch.moves import permute
from parallel.topology import Topology
from parallel.transformer_engine import row_multiple

SMALLEST = 1e-6
"""Length of a state that is none, so that a row of padding has a gate."""
LENGTH_MULTIPLE = 256
"""What sequences of chosen tokens are padded to on a GPU, whose attention kernels are planned anew for every length."""


class DepthGate(torch.nn.Module):
    """Which tokens go through a layer, and with what weight.

    Attributes:
        observe: called once a micro-batch with this rank's number of tokens that go through and the sum of its gates.
    """

    def __init__(self, name: str, config: ModelConfig, topology: Topology, options: ModelOptions):
        super().__init__()
        self.config, self.topology = config.depth, topology
        self.queries_per_position = config.attention.queries_per_kv_head
        self.row_multiple = row_multiple(options.fp8_recipe)
        self.weight = sequence_parallel(
            new_parameter(
                f"{name}.weight",
                (1, config.hidden_size),
                replica=topology.tensor_rank,
                dtype=options.dtype,
                device=topology.device,
            )
        )
        self.observe: Callable[[int, torch.Tensor], None] | None = None

    def forward(self, x_sbh: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, ChosenTokens]:
        """The gate of each row, ``[s * B, 1]`` in the precision of ``x_sbh``, and the tokens that go through."""
        x_th = x_sbh.flatten(0, 1)
        valid = tokens.valid_rows(len(x_th))
        size_t1 = torch.linalg.vector_norm(x_th, dim=1, keepdim=True, dtype=torch.float32).clamp(min=SMALLEST)
        logits_t1 = F.linear(x_th, self.weight).float() / size_t1 + _logit(self.config.initial_gate)
        chosen_t = (logits_t1.detach() >= _logit(self.config.threshold)).squeeze(1)
        chosen_t[valid:] = False
        chosen = ChosenTokens(
            chosen_t.view(x_sbh.shape[:2]), tokens, self.topology, self.row_multiple, self.queries_per_position
        )
        gates_t1 = logits_t1.sigmoid()
        if self.training and torch.is_grad_enabled():
            total = gates_t1[:valid].sum()
            part = sum(chosen.lengths) / tokens.count
            loss = self.config.coef * part * total / tokens.count / tokens.micro_batches
            gates_t1 = MoEAuxLossAutoScaler.apply(gates_t1, loss)
            if self.observe is not None:
                self.observe(chosen.own, total.detach())
        return gates_t1.to(x_sbh.dtype), chosen


class ChosenTokens:
    """The tokens of a micro-batch that go through a layer, as :class:`moe_train.model.tokens.Tokens` are all of them.

    They are one sequence of rows ``[t, 1, H]`` to everything but the attention itself, on each tensor rank its own and
    then padding, since all must have as many. The host waits for their number.

    Attributes:
        lengths: how many there are of each sequence.
        count: how many there are, over all tensor ranks, but 1 where there is none.
        own: how many there are on this one.
        rotary, mask: for their sequences ``[S', B, ...]``, each as long as the longest.
    """

    sequences = 1

    def __init__(
        self,
        chosen_sb: torch.Tensor,
        tokens: Tokens,
        topology: Topology,
        row_multiple: int = 1,
        queries_per_position: int = 1,
    ):
        ranks, device = topology.layout.tensor, chosen_sb.device
        whole_sb = topology.gather_over_tensor_ranks(chosen_sb.byte())
        counts_rb = whole_sb.view(ranks, -1, tokens.sequences).sum(dim=1).tolist()
        by_rank = [sum(counts) for counts in counts_rb]
        self.lengths = [sum(counts) for counts in zip(*counts_rb)]
        self.count, self.own = max(1, sum(by_rank)), by_rank[topology.tensor_rank]
        self.micro_batches = tokens.micro_batches

        rows = _multiple(max(1, *by_rank), row_multiple)
        self._index = _places_of_ones(chosen_sb, self.own)
        self._rows = _Moves(self._index, torch.arange(self.own, device=device), chosen_sb.numel(), rows)

        longest = _multiple(max(1, *self.lengths), LENGTH_MULTIPLE if device.type == "cuda" else 1)
        self._shape = (longest, tokens.sequences)
        token_c = _places_of_ones(whole_sb, sum(by_rank))
        row_c = torch.cat([rank * rows + torch.arange(count, device=device) for rank, count in enumerate(by_rank)])
        position_c = whole_sb.cumsum(dim=0).flatten()[token_c] - 1
        place_c = position_c * tokens.sequences + token_c % tokens.sequences
        self._sequences = _Moves(row_c, place_c, ranks * rows, longest * tokens.sequences)

        def in_sequences(values_c: torch.Tensor, otherwise: int) -> torch.Tensor:
            """What the chosen tokens have, ``[C, ...]``, as ``[S', B, ...]``."""
            out = values_c.new_full((longest * tokens.sequences, *values_c.shape[1:]), otherwise)
            return out.index_copy_(0, place_c, values_c).view(*self._shape, *values_c.shape[1:])

        self.rotary = self.mask = None
        if tokens.rotary is not None:
            of_positions = tokens.rotary[0].dim() == 2  # the same in every sequence
            self.rotary = tuple(
                in_sequences(table[token_c // tokens.sequences] if of_positions else table.flatten(0, 1)[token_c], 0)
                for table in tokens.rotary
            )
        if tokens.documents is not None:
            documents_sb = in_sequences(tokens.documents.t().flatten()[token_c], -1)
            self.mask = document_mask(documents_sb.t(), tokens.mask.dtype, queries_per_position)

    def valid_rows(self, rows: int) -> int:
        """How many of the local rows are no padding (they come first)."""
        return self.own

    def take(self, x_th: torch.Tensor) -> torch.Tensor:
        """Rows ``[T, H]`` of all local tokens to those of the chosen ones, ``[t, 1, H]``; padding is zeros."""
        return self._rows.there(x_th).unsqueeze(1)

    def put_back(self, some_t1h: torch.Tensor, x_sbh: torch.Tensor) -> torch.Tensor:
        """``x_sbh`` with the rows of the chosen tokens in their places."""
        return x_sbh.flatten(0, 1).index_copy(0, self._index, some_t1h[: self.own, 0]).view(x_sbh.shape)

    def to_sequences(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of all tensor ranks, ``[TP * t, 1, ...]``, as sequences without gaps, ``[S', B, ...]``; zeros from the
        end of a sequence on."""
        return self._sequences.there(x.flatten(1)).view(*self._shape, *x.shape[2:])

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The way back of :meth:`to_sequences`."""
        return self._sequences.back(x.flatten(0, 1).flatten(1)).view(-1, 1, *x.shape[2:])


class _Moves:
    """Rows ``[sources, D]`` to ``[targets, D]`` and back: row ``source[i]`` to ``target[i]``, zeros to where none
    goes."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor, sources: int, targets: int):
        self._source_of = source.new_full((targets,), sources).index_copy_(0, target, source)
        self._target_of = source.new_full((sources,), targets).index_copy_(0, source, target)

    def there(self, rows: torch.Tensor) -> torch.Tensor:
        return permute(rows, self._source_of, self._target_of, True, True)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        return permute(rows, self._target_of, self._source_of, True, True)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _places_of_ones(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` ones among zeros are, in their order; unlike `nonzero` it does not have the host wait."""
    return torch.argsort(1 - values.flatten().byte(), stable=True)[:count]
