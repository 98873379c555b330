"""What every kind of attention does once it has queries, keys and values: turn, remember, attend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_train.model.rope import rotate
from moe_train.model.tokens import Tokens

CACHE_STEP = 256
"""Tokens by which a cache grows: copying it for each of them would cost more than the attention over it."""


class LayerCache:
    """Keys (rotated) and values of the tokens that one layer has seen.

    Attributes:
        lengths: how many of each sequence; empty before the first.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._room: torch.Tensor | None = None  # [2, at least the longest, B, n / TP, d]

    def extend(self, keys: torch.Tensor, values: torch.Tensor, counts: list[int]) -> None:
        """Append the first ``counts[b]`` of ``[s, B, n / TP, d]`` to those of sequence b."""
        before = self.lengths or [0] * len(counts)
        self.lengths = [seen + count for seen, count in zip(before, counts)]
        if self._room is None or max(self.lengths) > self._room.shape[1]:
            room = keys.new_zeros(2, max(self.lengths) + CACHE_STEP, *keys.shape[1:])
            if self._room is not None:
                room[:, : self._room.shape[1]] = self._room
            self._room = room
        for sequence, (start, end, count) in enumerate(zip(before, self.lengths, counts)):
            self._room[0, start:end, sequence] = keys[:count, sequence]
            self._room[1, start:end, sequence] = values[:count, sequence]

    def seen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values, ``[S, B, n / TP, d]`` each for the longest sequence, and which are there, ``[B, 1, 1, S]``;
        None: all."""
        longest = max(self.lengths)
        keys, values = self._room[:, :longest]
        if min(self.lengths) == longest:
            return keys, values, None
        lengths_b1 = torch.tensor(self.lengths, device=keys.device).unsqueeze(1)
        return keys, values, (torch.arange(longest, device=keys.device) < lengths_b1)[:, None, None]


def attend(
    q_sbngd: torch.Tensor,
    k_sbnd: torch.Tensor,
    v_sbnd: torch.Tensor,
    tokens: Tokens,
    core: Callable[..., torch.Tensor],
    cache: LayerCache | None = None,
) -> torch.Tensor:
    """Causal attention with rotary positions over this rank's kv heads n; the g queries of a token that meet one
    kv head are one group. Takes the rows of all tensor ranks, ``[S, B, ...]``; the result has the shape of the
    queries.

    ``core`` (:func:`causal_attention`, or one like it) computes it where nothing but what comes later is hidden from a
    query.
    """
    q_sbngd, k_sbnd, v_sbnd = (tokens.to_sequences(x) for x in (q_sbngd, k_sbnd, v_sbnd))
    q_sbngd, k_sbnd = rotate(q_sbngd, tokens.rotary), rotate(k_sbnd, tokens.rotary)
    more = cache is not None and any(cache.lengths)
    if cache is not None:
        cache.extend(k_sbnd, v_sbnd, tokens.lengths)
    if more:  # one new token of each sequence: it may look at everything
        keys, values, mask = cache.seen()
        o_sbngd = _attention(q_sbngd, keys, values, mask=mask)
    elif tokens.mask is not None:
        o_sbngd = _attention(q_sbngd, k_sbnd, v_sbnd, mask=tokens.mask)
    else:
        o_sbngd = core(q_sbngd, k_sbnd, v_sbnd)
    return tokens.to_rows(o_sbngd)


def causal_attention(q_sbngd: torch.Tensor, k_sbnd: torch.Tensor, v_sbnd: torch.Tensor) -> torch.Tensor:
    """torch's, by whichever of its kernels it takes for best."""
    return _attention(q_sbngd, k_sbnd, v_sbnd, causal=True)


def _attention(q_sbngd, k_sbnd, v_sbnd, *, causal: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
    q_bngsd = q_sbngd.permute(1, 2, 3, 0, 4)
    k_bnsd, v_bnsd = k_sbnd.permute(1, 2, 0, 3), v_sbnd.permute(1, 2, 0, 3)
    group = q_bngsd.shape[2]
    with _kernels(q_sbngd, causal):
        if mask is not None:
            # The group as more positions of one head: of the fused kernels only cuDNN's takes a mask and grouped
            # queries at once.
            o_bhsd = F.scaled_dot_product_attention(q_bngsd.flatten(2, 3), k_bnsd, v_bnsd, attn_mask=mask)
        elif q_sbngd.is_cuda and q_sbngd.dtype == torch.float32:
            # The one fused kernel for fp32 takes no grouped queries.
            keys, values = (x.repeat_interleave(group, dim=1) for x in (k_bnsd, v_bnsd))
            o_bhsd = F.scaled_dot_product_attention(q_bngsd.flatten(1, 2), keys, values, is_causal=causal)
        else:
            o_bhsd = F.scaled_dot_product_attention(
                q_bngsd.flatten(1, 2), k_bnsd, v_bnsd, is_causal=causal, enable_gqa=group > 1
            )
    return o_bhsd.view(q_bngsd.shape).permute(3, 0, 1, 2, 4)


def _kernels(q_sbngd: torch.Tensor, causal: bool) -> AbstractContextManager:
    """Which of torch's kernels may compute it. On a GPU not cuDNN's, but where nothing is hidden but what comes later,
    or the length is a multiple of 128: with a mask its gradients of some other lengths are NaN (pytorch issue 196678,
    cuDNN 9.19), and it takes long to plan for a length, of which a cache has another with every token.
    """
    if causal or not q_sbngd.is_cuda or len(q_sbngd) % 128 == 0:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
