"""Several documents in one window, each by itself: attention and positions restart where a document starts.

A document starts at the first position of a window and after every end-of-document token.
"""

from __future__ import annotations

import torch

HIDDEN = -1e30
"""Added to the score of what a query may not look at. Finite: kernels have made NaN of infinities."""


def document_positions(ids_bs: torch.Tensor, document_end: int) -> torch.Tensor:
    """Token ids ``[B, S]`` to the position of each token in its document, ``[S, B]``."""
    index = torch.arange(ids_bs.shape[1], device=ids_bs.device)
    starts = torch.where(_follows_end(ids_bs, document_end), index, 0)
    return (index - starts.cummax(dim=1).values).t()


def document_numbers(ids_bs: torch.Tensor, document_end: int) -> torch.Tensor:
    """Token ids ``[B, S]`` to which document of its window each token is of, from 0, ``[B, S]``."""
    return _follows_end(ids_bs, document_end).cumsum(dim=1)


def document_mask(documents_bs: torch.Tensor, dtype: torch.dtype, queries_per_position: int = 1) -> torch.Tensor:
    """:func:`document_numbers` ``[B, S]`` to what is added to the scores of each query, ``[B, 1, queries_per_position *
    S, S]``: 0 for what it may look at, :data:`HIDDEN` for all else.

    It may look at itself and at what precedes it in its document. Queries lie by slot, then by position, as
    :class:`~moe_train.model.attention.MixtureOfAttention` lays them. ``dtype`` is that of the queries: of a boolean
    mask torch would make one of its own in every layer, and keep them all for the backward.
    """
    seen_bss = (documents_bs[:, :, None] == documents_bs[:, None, :]).tril_()
    mask_bss = torch.full_like(seen_bss, HIDDEN, dtype=dtype).masked_fill_(seen_bss, 0.0)
    return mask_bss.repeat(1, queries_per_position, 1)[:, None]


def _follows_end(ids_bs: torch.Tensor, document_end: int) -> torch.Tensor:
    ended = ids_bs == document_end
    return torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
