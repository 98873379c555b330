"""What every kind of attention does once it has queries, keys and values: turn, remember, attend."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_train.model.rope import rotate
from moe_train.model.router import Tokens


@dataclass
class LayerCache:
    """Keys (rotated) and values of the tokens that one layer has seen, ``[S, B, n / TP, d]`` each; None before the first."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return the whole."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.values = values if self.values is None else torch.cat([self.values, values])
        return self.keys, self.values


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
        first = cache.keys is None
        seen = cache.extend(k_sbnd[: tokens.length], v_sbnd[: tokens.length])
        if not first:  # one new token: it may look at everything
            return _attention(q_sbngd, *seen, causal=False)
    return core(q_sbngd, k_sbnd, v_sbnd) if tokens.mask is None else _attention(q_sbngd, k_sbnd, v_sbnd, mask=tokens.mask)


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
        # The group as more positions of one head: no fused kernel of a GPU takes a mask and grouped queries at once.
        o_bhsd = F.scaled_dot_product_attention(q_bngsd.flatten(2, 3), k_bnsd, v_bnsd, attn_mask=mask)
    return o_bhsd.view(q_bngsd.shape).permute(3, 0, 1, 2, 4)
