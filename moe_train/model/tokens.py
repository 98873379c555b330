"""Where the rows of a layer stand in the sequences of their micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """All tokens of a micro-batch: this tensor rank's rows ``[s * B, H]``, position by position, at each the sequences
    in their order.

    ``sequences`` is B; ``length`` the length S of the sequences before padding, over all tensor ranks; ``first`` the
    position of this rank's first row in them; positions from ``length`` on are padding. ``micro_batches``: those that
    go through the model together; the losses of each count for as much less. ``rotary``: cos and sin of the positions
    (:func:`moe_train.model.rope.rotary_table`). ``documents``: ``[B, S]`` which of its sequence's documents a token is
    of, where each is by itself; ``mask``: what is added to its scores then
    (:func:`moe_train.model.documents.document_mask`). Without, it may look at everything before it.
    """

    sequences: int
    length: int
    first: int
    micro_batches: int = 1
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    documents: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Tokens of the micro-batch, over all tensor ranks."""
        return self.sequences * self.length

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.length] * self.sequences

    def valid_rows(self, rows: int) -> int:
        """How many of the local rows are no padding (they come first)."""
        return max(0, min(rows // self.sequences, self.length - self.first)) * self.sequences

    def to_sequences(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of all tensor ranks, ``[S, B, ...]``, as sequences without gaps: as they are."""
        return x

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The way back of :meth:`to_sequences`."""
        return x
