"""Whether the rectangles of a checkpoint cover every tensor of a model exactly once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_train.model.config import ModelConfig

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

KINDS = ("weights", "main", "exp_avg", "exp_avg_sq")
SCALES = ("fp8_forward_scale", "fp8_forward_amax", "fp8_backward_scale", "fp8_backward_amax")
"""Of FP8 products, named after their weights, in shapes of their own."""
Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, extent)"""


def what_is_not_covered(metadata: Metadata, config: ModelConfig) -> str | None:
    """The first fault: a tensor that is missing, that is not the model's, or that its rectangles do not tile;
    None without one.

    Weights must be there; moments and main parameters of all parameters or of none.
    """
    shapes, stored = config.parameter_shapes(), metadata.state_dict_metadata
    for kind in KINDS:
        present = [name for name in shapes if f"{kind}.{name}" in stored]
        missing = [name for name in shapes if f"{kind}.{name}" not in stored]
        if missing and (present or kind == "weights"):
            return f"{kind}.{missing[0]} is missing"
    for key, tensor in stored.items():
        kind, _, name = key.partition(".")
        if kind not in (*KINDS, *SCALES) or name not in shapes:
            return f"{key} is no part of the model in run_state.json"
        if kind in KINDS and tuple(tensor.size) != tuple(shapes[name]):
            return f"{key} has the shape {tuple(tensor.size)}, the model in run_state.json {tuple(shapes[name])}"
        if fault := what_is_not_tiled(
            tuple(tensor.size), [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
        ):
            return f"{key}: {fault}"
    return None


def what_is_not_tiled(shape: tuple[int, ...], rectangles: list[Rectangle]) -> str | None:
    """Why ``rectangles`` do not cover each element of a tensor once, or None.

    They do if none sticks out, no two overlap, and their sizes add up. Sorted by their beginning in the
    longest dimension, one is compared only with those that have not ended there."""
    for offset, extent in rectangles:
        if any(start < 0 or length < 1 or start + length > size for start, length, size in zip(offset, extent, shape)):
            return f"a rectangle at {offset} of {extent} sticks out"
    sweep = max(range(len(shape)), key=lambda dim: shape[dim], default=0)
    open_ones: list[Rectangle] = []
    for current in sorted(rectangles, key=lambda rectangle: rectangle[0][sweep : sweep + 1]):
        open_ones = [each for each in open_ones if each[0][sweep] + each[1][sweep] > current[0][sweep]]
        if any(_overlap(current, other) for other in open_ones):
            return f"the rectangle at {current[0]} of {current[1]} overlaps another"
        open_ones.append(current)
    covered, size = sum(math.prod(extent) for _, extent in rectangles), math.prod(shape)
    return None if covered == size else f"{size - covered} of {size} elements are not covered"


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(a[0], a[1], b[0], b[1]))
