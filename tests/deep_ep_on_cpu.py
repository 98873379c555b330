"""DeepEP's buffer over any process group of torch: the part of its interface that trains, with the checks of its C++
part.

Rows arrive in the order of their ranks, and of their places there, as from the real one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


class Buffer:
    def __init__(self, group, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> SimpleNamespace:
        assert num_ranks in SIZES, f"Unsupported number of EP ranks: {num_ranks}"
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: 10 * ranks * 256 * hidden_bytes,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int):
        assert topk_idx.dtype == torch.int64 and topk_idx.dim() == 2 and topk_idx.is_contiguous() and num_experts > 0
        ranks = self.group.size()
        rank_tk = topk_idx.div(num_experts // ranks, rounding_mode="floor")  # -1 stays -1
        goes_tr = (rank_tk.unsqueeze(2) == torch.arange(ranks)).any(1)
        per_expert = (topk_idx.unsqueeze(2) == torch.arange(num_experts)).sum((0, 1))
        return goes_tr.sum(0).int(), None, per_expert.int(), goes_tr, None

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
    ):
        assert x.dim() == 2 and x.is_contiguous() and x.shape[1] * x.element_size() % 16 == 0
        ranks = self.group.size()
        if handle is not None:
            assert topk_idx is None and topk_weights is None and len(handle.goes) == len(x)
            return (
                self._exchange(self._copies(x, handle.goes), handle.sent, handle.received),
                None,
                None,
                None,
                None,
                None,
            )
        assert is_token_in_rank.dtype == torch.bool and is_token_in_rank.shape == (len(x), ranks)
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape and len(topk_idx) == len(x)
        sent = num_tokens_per_rank.tolist()
        received = self._exchange(num_tokens_per_rank, [1] * ranks, [1] * ranks).tolist()
        handle = SimpleNamespace(goes=is_token_in_rank, sent=sent, received=received)
        held = len(num_tokens_per_expert) // ranks
        expert = self._exchange(self._copies(topk_idx, handle.goes), sent, received) - self.group.rank() * held
        expert.masked_fill_((expert < 0) | (expert >= held), -1)
        counts = [int((expert == each).sum()) for each in range(held)]
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        weights = self._exchange(self._copies(topk_weights, handle.goes), sent, received)
        return self._exchange(self._copies(x, handle.goes), sent, received), expert, weights, counts, handle, None

    def combine(self, x, handle):
        assert (
            x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] * x.element_size() % 16 == 0
        )
        assert len(x) == sum(handle.received)
        answers = self._exchange(x, handle.received, handle.sent)
        total = torch.zeros(len(handle.goes), x.shape[1])
        total.index_add_(0, handle.goes.T.nonzero()[:, 1], answers.float())
        return total.to(x.dtype), None, None

    def _copies(self, x: torch.Tensor, goes_tr: torch.Tensor) -> torch.Tensor:
        return x[goes_tr.T.nonzero()[:, 1]]

    def _exchange(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group)
        return out


@contextlib.contextmanager
def deep_ep_on_cpu() -> Iterator[None]:
    """megatron-core finds this buffer where it looks for DeepEP's."""
    from megatron.core.transformer.moe import fused_a2a

    with (
        mock.patch.object(fused_a2a, "HAVE_DEEP_EP", True),
        mock.patch.object(fused_a2a, "Buffer", Buffer, create=True),
        mock.patch.object(fused_a2a, "_buffer", None),
    ):
        yield
