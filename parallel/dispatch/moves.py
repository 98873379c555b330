"""Moves of rows, there and back: gathers in both directions.

The backward of a gather by a permutation is the gather by its inverse, which unlike a scatter-add is deterministic on a
GPU and fast on a CPU. An index of ``len(rows)`` stands for nobody's row, of zeros; where there may be one, the caller
says so.
"""

from __future__ import annotations

import torch

from parallel.fuse import fused


def gather_tokens(
    x_th: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    top_k: int,
    filled: bool = False,
    left_out: bool = False,
) -> torch.Tensor:
    """``[R, H]``: row r is token ``order[r] // k``.

    Args:
        order: ``[R]`` the pair (token * k + slot) of each row; T * k, where ``filled`` says that some are, for
            nobody's.
        inverse: ``[T * k]`` the row of each pair; R, where some are ``left_out``, for one that is in none.
    """
    return _GatherTokens.apply(x_th, order, inverse, top_k, filled, left_out)


def permute(
    rows: torch.Tensor,
    index: torch.Tensor,
    back: torch.Tensor,
    some_nobody: bool = False,
    some_nobody_back: bool = False,
) -> torch.Tensor:
    """``rows[index]``, where ``back`` is the index of the way back. Each may point to nobody, and is said to if it
    does."""
    return _Permute.apply(rows, index, back, some_nobody, some_nobody_back)


def rows_to_heads(
    rows: torch.Tensor,
    heads: int,
    order: torch.Tensor,
    inverse: torch.Tensor,
    top_k: int,
    filled: bool = False,
    left_out: bool = False,
) -> torch.Tensor:
    """``[R, n * d]`` rows to ``[T, n, k, d]``: slots beside each other in each of ``heads`` n. The indices are those of
    :func:`gather_tokens`."""
    return _RowsToHeads.apply(rows, heads, order, inverse.view(-1, top_k), filled, left_out)


def heads_to_rows(
    x_tnkd: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, filled: bool = False, left_out: bool = False
) -> torch.Tensor:
    """The way back of :func:`rows_to_heads`."""
    return _HeadsToRows.apply(x_tnkd, order, inverse.view(-1, x_tnkd.shape[2]), filled, left_out)


def weighted_sum(
    rows: torch.Tensor,
    gates_tk: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    inverse: torch.Tensor,
    filled: bool = False,
    left_out: bool = False,
) -> torch.Tensor:
    """``sum_s gate[t, s] * rows[inverse[t * k + s]] + bias`` without a ``[T, k, H]`` tensor; the indices are those of
    :func:`gather_tokens`."""
    return _WeightedSum.apply(rows, gates_tk, bias, order, inverse, filled, left_out)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_th, order, inverse, top_k, filled, left_out):
        ctx.save_for_backward(inverse)
        ctx.top_k, ctx.left_out = top_k, left_out
        return _take(x_th, order if top_k == 1 else order // top_k, filled)

    @staticmethod
    def backward(ctx, grad_rows):
        (inverse,) = ctx.saved_tensors
        return _sum_of_slots(grad_rows, inverse.view(-1, ctx.top_k), ctx.left_out), None, None, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, back, some_nobody, some_nobody_back):
        ctx.save_for_backward(back)
        ctx.some_nobody = some_nobody_back
        return _take(rows, index, some_nobody)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return _take(grad, back, ctx.some_nobody), None, None, None, None


class _RowsToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, heads, order, slots_tk, filled, left_out):
        ctx.save_for_backward(order)
        ctx.filled = filled
        return _take_heads(rows, slots_tk, heads, left_out)

    @staticmethod
    def backward(ctx, grad_tnkd):
        return _take_pairs(grad_tnkd, *ctx.saved_tensors, ctx.filled), None, None, None, None, None


class _HeadsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tnkd, order, slots_tk, filled, left_out):
        ctx.save_for_backward(slots_tk)
        ctx.heads, ctx.left_out = x_tnkd.shape[1], left_out
        return _take_pairs(x_tnkd, order, filled)

    @staticmethod
    def backward(ctx, grad_rows):
        return _take_heads(grad_rows, *ctx.saved_tensors, ctx.heads, ctx.left_out), None, None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gates_tk, bias, order, inverse, filled, left_out):
        ctx.save_for_backward(rows, gates_tk, order, inverse)
        ctx.filled, ctx.left_out, ctx.biased = filled, left_out, bias is not None
        return _weighted_sum_of_slots(rows, gates_tk, bias, inverse.view(gates_tk.shape), left_out)

    @staticmethod
    def backward(ctx, grad_th):
        rows, gates_tk, order, inverse = ctx.saved_tensors
        grads = _weighted_sum_backward(grad_th, rows, gates_tk, order, inverse, ctx.filled, ctx.left_out)
        return *grads, grad_th.sum(0) if ctx.biased else None, None, None, None, None


def _take(rows: torch.Tensor, index: torch.Tensor, some_nobody: bool) -> torch.Tensor:
    """``rows[index]``, as one kernel."""
    return _or_zeros(rows, index) if some_nobody else rows.index_select(0, index)


def _rows_at(rows: torch.Tensor, index: torch.Tensor, some_nobody: bool) -> torch.Tensor:
    """The same as a part of a longer chain."""
    return _or_zeros.plain(rows, index) if some_nobody else rows.index_select(0, index)


@fused
def _or_zeros(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if not len(rows):
        return rows.new_zeros(len(index), rows.shape[1])
    nobody = (index == len(rows)).unsqueeze(1)
    return rows.index_select(0, index.clamp(max=len(rows) - 1)).masked_fill_(nobody, 0)


def _take_heads_by_parts(rows: torch.Tensor, slots_tk: torch.Tensor, heads: int, some_nobody: bool) -> torch.Tensor:
    parts = rows.reshape(-1, rows.shape[1] // heads)
    part_tnk = slots_tk.unsqueeze(1) * heads + torch.arange(heads, device=rows.device).unsqueeze(1)
    taken = _take(parts, part_tnk.reshape(-1).clamp_(max=len(parts)), some_nobody)
    return taken.view(*part_tnk.shape, parts.shape[1])


@fused(eager=_take_heads_by_parts)
def _take_heads(rows: torch.Tensor, slots_tk: torch.Tensor, heads: int, some_nobody: bool) -> torch.Tensor:
    """``[R, n * d]`` to ``[T, n, k, d]``: the row of each slot, head by head."""
    taken = _rows_at(rows, slots_tk.reshape(-1), some_nobody)
    return taken.view(*slots_tk.shape, heads, rows.shape[1] // heads).transpose(1, 2).contiguous()


def _take_pairs_by_parts(x_tnkd: torch.Tensor, order: torch.Tensor, some_nobody: bool) -> torch.Tensor:
    _, heads, top_k, width = x_tnkd.shape
    parts = x_tnkd.reshape(-1, width)
    first_r1 = (order // top_k * (heads * top_k) + order % top_k).unsqueeze(1)
    part_rn = first_r1 + torch.arange(0, heads * top_k, top_k, device=order.device)
    return _take(parts, part_rn.view(-1).clamp_(max=len(parts)), some_nobody).view(len(order), heads * width)


@fused(eager=_take_pairs_by_parts)
def _take_pairs(x_tnkd: torch.Tensor, order: torch.Tensor, some_nobody: bool) -> torch.Tensor:
    """``[T, n, k, d]`` to ``[R, n * d]``: the pair of each row, its heads beside each other."""
    pairs = x_tnkd.transpose(1, 2).reshape(-1, x_tnkd.shape[1] * x_tnkd.shape[3])
    return _rows_at(pairs, order, some_nobody)


@fused
def _sum_of_slots(rows: torch.Tensor, slots_tk: torch.Tensor, left_out: bool) -> torch.Tensor:
    """``sum_s rows[slots[t, s]]``, ``[T, H]``."""
    out = _rows_at(rows, slots_tk[:, 0], left_out)
    for slot in range(1, slots_tk.shape[1]):
        out += _rows_at(rows, slots_tk[:, slot], left_out)
    return out


@fused
def _weighted_sum_of_slots(
    rows: torch.Tensor, gates_tk: torch.Tensor, bias: torch.Tensor | None, slots_tk: torch.Tensor, left_out: bool
) -> torch.Tensor:
    """``sum_s gate[t, s] * rows[slots[t, s]] + bias``, ``[T, H]``."""
    out = _rows_at(rows, slots_tk[:, 0], left_out).mul_(gates_tk[:, :1])
    for slot in range(1, slots_tk.shape[1]):
        out.addcmul_(_rows_at(rows, slots_tk[:, slot], left_out), gates_tk[:, slot : slot + 1])
    return out if bias is None else out.add_(bias)


@fused
def _weighted_sum_backward(
    grad_th, rows, gates_tk, order, inverse, filled: bool, left_out: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rows and gates."""
    grad_rows = _rows_at(grad_th, order // gates_tk.shape[1], filled)
    grad_gates = torch.linalg.vecdot(grad_rows, rows).unsqueeze(1)
    grad_gates = _rows_at(grad_gates, inverse, left_out).view_as(gates_tk)
    return grad_rows.mul_(_rows_at(gates_tk.reshape(-1, 1), order, filled)), grad_gates
