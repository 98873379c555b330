"""Operations of a dense Transformer as Chinchilla counts them (arXiv 2203.15556, appendix F), beside 6ND."""

from __future__ import annotations

import math
from dataclasses import dataclass

VOCABULARY, SEQUENCE = 32000, 2048


@dataclass(frozen=True)
class DenseShape:
    """Layers, width d, MLP width, heads h and head size k of a Transformer with relative positions."""

    layers: int
    width: int
    ffn: int
    heads: int
    head_dim: int

    @property
    def params(self) -> int:
        """All parameters: query, key, value, output and relative-position matrices, MLP, and the embedding
        once."""
        attention = 5 * self.width * self.heads * self.head_dim
        return self.layers * (attention + 2 * self.width * self.ffn) + VOCABULARY * self.width

    def flops_per_token(self, sequence: int = SEQUENCE, *, vocabulary: bool = True) -> float:
        """Training operations per token: forward, and twice that backward.

        `vocabulary=False` leaves out embedding and logits. The ratios that Table A4 prints are those
        without: with them its smallest model comes to 1.58 times 6ND, not to 1.03.
        """
        inner = self.heads * self.head_dim
        attention = 6 * self.width * inner + 4 * sequence * inner + 3 * self.heads * sequence + 2 * inner * self.width
        forward = self.layers * (attention + 4 * self.width * self.ffn)
        if vocabulary:
            forward += 4 * VOCABULARY * self.width
        return 3.0 * forward


TABLE_A4 = (
    DenseShape(10, 640, 2560, 10, 64),
    DenseShape(20, 1024, 4096, 16, 64),
    DenseShape(24, 1280, 5120, 10, 128),
    DenseShape(26, 1792, 7168, 14, 128),
    DenseShape(28, 2048, 8192, 16, 128),
    DenseShape(40, 3584, 14336, 28, 128),
)
"""The shapes of Table A4, smallest first."""

CHINCHILLA_70B = DenseShape(80, 8192, 32768, 64, 128)


def typical_shape(params: float) -> DenseShape:
    """A shape of about `params` parameters in the proportions of the paper's models: depth read off between
    them.

    Widths are multiples of 128, so the size is met within a few percent; what is used of it is operations per
    parameter.
    """
    known = (*TABLE_A4, CHINCHILLA_70B)
    width = 128
    while _of_width(width + 128, known).params <= params:
        width = math.ceil(width * 1.02 / 128) * 128
    return min((_of_width(w, known) for w in (width, width + 128)), key=lambda shape: abs(shape.params - params))


def _of_width(width: int, known: tuple[DenseShape, ...]) -> DenseShape:
    """Depth grows between the known shapes as a power of the width, and beyond them as between the last
    two."""
    after = next((n for n in range(1, len(known)) if width <= known[n].width), len(known) - 1)
    low, high = known[after - 1], known[after]
    slope = math.log(high.layers / low.layers) / math.log(high.width / low.width)
    layers = max(1, round(low.layers * (width / low.width) ** slope))
    return DenseShape(layers, width, 4 * width, max(1, width // 128), 128)


def appendix_f_flops(params: float, tokens: float) -> float:
    """Operations of training a typical dense model, everything of appendix F counted (vocabulary
    included)."""
    shape = typical_shape(params)
    return shape.flops_per_token() / shape.params * params * tokens
