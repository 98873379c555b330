"""How a model is built, apart from what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelOptions:
    """Precision, first weights, and what is kept or computed again.

    ``recompute``: which activations the backward computes again: ``none``; ``selective``, those inside the MLPs;
    ``full``, each layer from its input. ``sharded_attention``: whether expert parallelism splits the attention experts
    too. ``initialize``: whether to draw initial weights; they are left as memory happens to be where a checkpoint is to
    follow. ``document_end``: the token that ends a document, where attention and positions are to restart after it;
    None: a window is one sequence. ``dispatcher``: how tokens get to the experts of other ranks, ``alltoall``,
    ``allgather`` or ``flex``. ``in_turn``: how many micro-batches go through the model together. ``kernels``: ``torch``
    or ``transformer_engine`` (:mod:`moe_train.model.kernels`). ``fp8_recipe``: how that multiplies in FP8, or None.
    """

    dtype: torch.dtype = torch.float32
    seed: int = 1234
    recompute: str = "none"
    sharded_attention: bool = True
    initialize: bool = True
    document_end: int | None = None
    dispatcher: str = "alltoall"
    in_turn: int = 1
    kernels: str = "torch"
    fp8_recipe: str | None = None
