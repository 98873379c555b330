"""How far apart two results are, and how far they may be."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """The largest relative distances: of the logits of half of the tokens, of each parameter's gradient, of the
    loss."""

    logits: float
    gradients: float
    loss: float


FP32 = Tolerance(2e-5, 2e-4, 2e-6)
"""Sums in another order; a few times what was found between layouts on CPUs."""
BF16 = Tolerance(0.03, 0.4, 5e-3)
"""8 bits of mantissa; one token in a hundred goes to another expert, which changes all gradients."""


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """``|found - wanted| / |wanted|``."""
    assert found.shape == wanted.shape, f"{found.shape} and {wanted.shape}"
    whole = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found - wanted)) / whole if whole else float(np.linalg.norm(found))


def typical_distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The median over the tokens of ``[B, S, V]`` of their logits' distance: what those that went elsewhere do not
    change."""
    assert found.shape == wanted.shape
    apart = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return float(np.median(apart))


def assert_close(found: dict, wanted: dict, tolerance: Tolerance) -> None:
    """Two answers of `tests.gpu.on_a_side.outputs` agree; else the message names what does not."""
    assert found["gradients"].keys() == wanted["gradients"].keys()
    far = {"loss": (abs(found["loss"] / wanted["loss"] - 1), tolerance.loss)}
    far["logits"] = typical_distance(found["logits"], wanted["logits"]), tolerance.logits
    for name, gradient in wanted["gradients"].items():
        far[name] = distance(found["gradients"][name], gradient), tolerance.gradients
    wrong = {name: f"{apart:.3g} > {limit:g}" for name, (apart, limit) in far.items() if not apart <= limit}
    assert not wrong, wrong


def spread(curves: list[list[float]]) -> float:
    """The largest relative difference of two curves at the same step."""
    return max((max(losses) - min(losses)) / statistics.mean(losses) for losses in zip(*curves))


def assert_curve_follows(found: list[float], wanted: list[float], tolerance: float) -> None:
    """Each loss is within ``tolerance`` of the other curve's, relative to it, and both curves fall."""
    assert len(found) == len(wanted) > 1
    assert found[-1] < found[0] and wanted[-1] < wanted[0]
    assert spread([found, wanted]) <= tolerance, list(zip(found, wanted))
