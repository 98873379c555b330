"""What every kind of attention does once it has queries, keys and values: turn, remember, attend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_train.model.rope import rotate
from moe_train.model.router import Tokens

CACHE_STEP = 256
"""Tokens by which a cache grows: copying it for each of them would cost more than the attention over it."""


class LayerCache:
    """Keys (rotated) and values of the tokens that one layer has seen."""

    def __init__(self) -> None:
        self.length = 0
        self._room: torch.Tensor | None = None  # [2, at least the length, B, n / TP, d]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append those of new tokens, ``[s, B, n / TP, d]`` each, and return the whole, ``[S, B, n / TP, d]``."""
        seen, self.length = self.length, self.length + len(keys)
        if self._room is None or self.length > self._room.shape[1]:
            room = keys.new_empty(2, self.length + CACHE_STEP, *keys.shape[1:])
            if self._room is not None:
                room[:, :seen] = self._room[:, :seen]
            self._room = room
        self._room[0, seen : self.length], self._room[1, seen : self.length] = keys, values
        return self._room[0, : self.length], self._room[1, : self.length]


def attend(
    q_sbngd: torch.Tensor,
    k_sbnd: torch.Tensor,
    v_sbnd: torch.Tensor,
    tokens: Tokens,
    rotary: tuple[torch.Tensor, torch.Tensor],
    core: Callable[..., torch.Tensor],
    cache: LayerCache | None = None,
) -> torch.Tensor:
    """Causal attention with rotary positions over this rank's kv heads n; the g queries of a token that meet one
    kv head are one group. Takes whole sequences ``[S, B, ...]``; the result has the shape of the queries.

    ``core`` (:func:`causal_attention`, or one like it) computes it where nothing but what comes later is hidden from a
    query.
    """
    q_sbngd, k_sbnd = rotate(q_sbngd, rotary), rotate(k_sbnd, rotary)
    if cache is not None:
        first = cache.length == 0
        seen = cache.extend(k_sbnd[: tokens.length], v_sbnd[: tokens.length])
        if not first:  # one new token: it may look at everything
            return _attention(q_sbngd, *seen, causal=False)
    return (
        core(q_sbngd, k_sbnd, v_sbnd) if tokens.mask is None else _attention(q_sbngd, k_sbnd, v_sbnd, mask=tokens.mask)
    )


def causal_attention(q_sbngd: torch.Tensor, k_sbnd: torch.Tensor, v_sbnd: torch.Tensor) -> torch.Tensor:
    """torch's, by whichever of its kernels it takes for best."""
    return _attention(q_sbngd, k_sbnd, v_sbnd, causal=True)


def _attention(q_sbngd, k_sbnd, v_sbnd, *, causal: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
    q_bngsd = q_sbngd.permute(1, 2, 3, 0, 4)
    k_bnsd, v_bnsd = k_sbnd.permute(1, 2, 0, 3), v_sbnd.permute(1, 2, 0, 3)
    if mask is None:
        group = q_bngsd.shape[2]
        o_bhsd = F.scaled_dot_product_attention(
            q_bngsd.flatten(1, 2), k_bnsd, v_bnsd, is_causal=causal, enable_gqa=group > 1
        )
    else:
        # The group as more positions of one head: of the fused kernels only cuDNN's takes a mask and grouped queries at
        # once.
        o_bhsd = F.scaled_dot_product_attention(q_bngsd.flatten(2, 3), k_bnsd, v_bnsd, attn_mask=mask)
    return o_bhsd.view(q_bngsd.shape).permute(3, 0, 1, 2, 4)
