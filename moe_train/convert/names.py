"""Which tensors of Hugging Face's models are which part of which parameter of ours. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_train.convert.hf_config import family_of
from moe_train.model.config import ModelConfig

if TYPE_CHECKING:
    import torch

WHOLE_MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Our name -> theirs, in every family."""


@dataclass(frozen=True)
class Counterpart:
    """One tensor of theirs: the part ``index`` of our parameter (the whole, where it is empty), with the same elements
    in the same order."""

    name: str
    shape: tuple[int, ...]
    hf_name: str
    hf_shape: tuple[int, ...]
    index: tuple = ()

    def theirs(self, ours: torch.Tensor) -> torch.Tensor:
        """Their tensor out of our parameter; a view where it can be."""
        return ours[self.index].reshape(self.hf_shape)


def counterparts(config: ModelConfig) -> list[Counterpart]:
    """Every tensor of theirs, in the order of our parameters; a tied head is the embedding.

    Raises UserError where no family of Hugging Face's can express the model.
    """
    tensors = family_of(config).tensors(config)
    pairs = []
    for name, shape in config.parameter_shapes().items():
        if name in WHOLE_MODEL:
            pairs.append(Counterpart(name, shape, WHOLE_MODEL[name], shape))
            continue
        _, layer, below = name.split(".", 2)
        for part in tensors[below]:
            hf_name = f"model.layers.{layer}.{part.hf_name}"
            pairs.append(Counterpart(name, shape, hf_name, part.shape or shape, part.index))
    return pairs
