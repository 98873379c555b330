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


def weighted_sum(
    rows: torch.Tensor,
    gates_tk: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    filled: bool = False,
    left_out: bool = False,
) -> torch.Tensor:
    """``sum_s gate[t, s] * rows[inverse[t * k + s]]`` without a ``[T, k, H]`` tensor; the indices are those of
    :func:`gather_tokens`."""
    return _WeightedSum.apply(rows, gates_tk, order, inverse, filled, left_out)


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


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gates_tk, order, inverse, filled, left_out):
        ctx.save_for_backward(rows, gates_tk, order, inverse)
        ctx.filled, ctx.left_out = filled, left_out
        return _weighted_sum_of_slots(rows, gates_tk, inverse.view(gates_tk.shape), left_out)

    @staticmethod
    def backward(ctx, grad_th):
        rows, gates_tk, order, inverse = ctx.saved_tensors
        grads = _weighted_sum_backward(grad_th, rows, gates_tk, order, inverse, ctx.filled, ctx.left_out)
        return *grads, None, None, None, None


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


@fused
def _sum_of_slots(rows: torch.Tensor, slots_tk: torch.Tensor, left_out: bool) -> torch.Tensor:
    """``sum_s rows[slots[t, s]]``, ``[T, H]``."""
    out = _rows_at(rows, slots_tk[:, 0], left_out)
    for slot in range(1, slots_tk.shape[1]):
        out += _rows_at(rows, slots_tk[:, slot], left_out)
    return out


@fused
def _weighted_sum_of_slots(
    rows: torch.Tensor, gates_tk: torch.Tensor, slots_tk: torch.Tensor, left_out: bool
) -> torch.Tensor:
    """``sum_s gate[t, s] * rows[slots[t, s]]``, ``[T, H]``."""
    out = _rows_at(rows, slots_tk[:, 0], left_out).mul_(gates_tk[:, :1])
    for slot in range(1, slots_tk.shape[1]):
        out.addcmul_(_rows_at(rows, slots_tk[:, slot], left_out), gates_tk[:, slot : slot + 1])
    return out


@fused
def _weighted_sum_backward(
    grad_th, rows, gates_tk, order, inverse, filled: bool, left_out: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rows and gates."""
    grad_rows = _rows_at(grad_th, order // gates_tk.shape[1], filled)
    grad_gates = torch.linalg.vecdot(grad_rows, rows).unsqueeze(1)
    grad_gates = _rows_at(grad_gates, inverse, left_out).view_as(gates_tk)
    return grad_rows.mul_(_rows_at(gates_tk.reshape(-1, 1), order, filled)), grad_gates
