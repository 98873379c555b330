"""Which part of a global parameter a rank's tensor holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """The rectangle of a global tensor that a local parameter holds.

    The local tensor, viewed with shape ``local_shape``, begins with the rectangle ``shape`` found at ``offset`` of the
    global tensor ``name`` of ``global_shape``. Only its first dimension may be longer than the rectangle: the rows
    beyond are padding that no checkpoint stores. ``replica`` is 0 on the one copy that writes where several
    model-parallel ranks hold the same rectangle (data-parallel replicas are told apart by the optimizer's shards).
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    replica: int = 0

    def valid(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a local tensor (of the parameter's size) that is not padding: ``shape``."""
        view = tensor.view(self.local_shape)
        return view if self.shape == self.local_shape else view[: self.shape[0]]


def place(parameter: torch.nn.Parameter, placement: Placement) -> torch.nn.Parameter:
    """Attach ``placement`` to ``parameter``, checking that they agree in size."""
    size = 1
    for extent in placement.local_shape:
        size *= extent
    if size != parameter.numel():
        raise ValueError(f"{placement.name}: local shape {placement.local_shape} does not fit {tuple(parameter.shape)}")
    parameter.placement = placement
    return parameter
