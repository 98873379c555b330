"""What one rank writes to a checkpoint and reads from it: rectangles of global tensors.

The keys are a function of the model alone: ``weights.NAME`` in the model's precision, ``exp_avg.NAME`` and
``exp_avg_sq.NAME`` in fp32, and ``main.NAME`` in fp32 where the weights are not. No layout, nor any version
of megatron-core, shows in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe_train.checkpoint.rectangles import rectangles
from parallel.placement import Placement

if TYPE_CHECKING:  # tensors are read and written on machines without megatron-core's imports too
    from moe_train.model.transformer import Transformer
    from moe_train.training.optimizer import Optimizer, ShardState


@dataclass(frozen=True)
class Piece:
    """A rectangle of the global tensor ``key``: ``tensor()`` is a view of the shape ``shape`` at
    ``offset``."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Callable[[], torch.Tensor]


class HostCopies:
    """Copies of pieces in host memory, kept from one save to the next: fresh memory costs several times what
    the copy does."""

    def __init__(self):
        self._copies: dict[tuple, torch.Tensor] = {}

    def take(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces with the values that they have now. Valid until it is called again."""
        taken = []
        for piece in pieces:
            source = piece.tensor()
            where = (piece.key, piece.offset)
            copied = self._copies.get(where)
            if copied is None or copied.shape != source.shape or copied.dtype != source.dtype:
                copied = self._copies[where] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            copied.copy_(source, non_blocking=source.is_cuda)
            taken.append(replace(piece, tensor=lambda copied=copied: copied))
        if any(copied.is_pinned() for copied in self._copies.values()):
            torch.cuda.synchronize()
        return taken


def pieces_to_save(optimizer: Optimizer) -> list[Piece]:
    """What this rank owns: the ranges that its optimizer updates, of every parameter of which it holds the
    first copy.

    The distributed optimizer has split each parameter over its data-parallel replicas, so each element is
    written once and all ranks write about as much."""
    pieces = []
    for shard in optimizer.shards():
        if shard.parameter.placement.replica == 0:
            pieces += _of_shard(
                "weights",
                shard,
                shard.parameter.detach().view(-1)[shard.start : shard.start + len(shard.main)],
            )
            pieces += _of_optimizer(shard)
    return pieces


def pieces_to_load(chunks: list[Transformer], optimizer: Optimizer | None, with_main: bool = True) -> list[Piece]:
    """What this rank needs: all of its parameters, and the optimizer state of the ranges that it updates.

    ``with_main`` is whether the checkpoint holds fp32 main parameters beside the weights: they are what a
    model in fp32 takes."""
    pieces = []
    for chunk in chunks:
        for parameter in chunk.parameters():
            placement: Placement = parameter.placement
            kind = "main" if with_main and parameter.dtype == torch.float32 else "weights"
            pieces.append(_piece(kind, placement, placement.offset, placement.valid(parameter.detach())))
    for shard in optimizer.shards() if optimizer else ():
        pieces += _of_optimizer(shard, main_from="main" if with_main else "weights")
    return pieces


def pieces_of_scales(chunks: list[Transformer], to_save: bool) -> list[Piece]:
    """The scales of FP8 products where the recipe remembers them (``delayed``): ``fp8_forward_scale.NAME``,
    ``fp8_forward_amax.NAME`` and the same of the backward, NAME being the product's weight. All that this rank holds,
    or those that it is the one ``to_save``."""
    return [
        _piece(scales.kind, scales.placement, scales.placement.offset, scales.tensor)
        for chunk in chunks
        for scales in chunk.kernels.scales(chunk)
        if not to_save or scales.placement.replica == 0
    ]


def _of_optimizer(shard: ShardState, main_from: str = "main") -> list[Piece]:
    separate = shard.parameter.dtype != torch.float32
    return [
        *(_of_shard(main_from, shard, shard.main) if separate else ()),
        *_of_shard("exp_avg", shard, shard.exp_avg),
        *_of_shard("exp_avg_sq", shard, shard.exp_avg_sq),
    ]


def _of_shard(kind: str, shard: ShardState, flat: torch.Tensor) -> list[Piece]:
    """The pieces of a flat tensor that belongs to the range of ``shard``; padding is left out."""
    placement: Placement = shard.parameter.placement
    size = 1
    for extent in placement.shape:
        size *= extent
    pieces = []
    taken = 0
    for offset, extent in rectangles(placement.local_shape, shard.start, min(shard.start + len(flat), size)):
        count = 1
        for side in extent:
            count *= side
        view = flat[taken : taken + count].view(extent)
        pieces.append(_piece(kind, placement, tuple(a + b for a, b in zip(placement.offset, offset)), view))
        taken += count
    return pieces


def _piece(kind: str, placement: Placement, offset: tuple[int, ...], view: torch.Tensor) -> Piece:
    key = f"{kind}.{placement.name}"
    return Piece(key, placement.global_shape, offset, tuple(view.shape), view.dtype, lambda: view)
