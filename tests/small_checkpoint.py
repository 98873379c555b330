"""A small model with random weights as a checkpoint on disk, and a tokenizer to go with it."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig, ModelConfig

VOCABULARY = 320
TEXT = """def main(argument):
    for number in range(10):
        print(number, "is a number, and so is", number + 1)  # with a comment
    return argument
The quick brown fox jumps over the lazy dog; schöne Grüße, naïve café.
"""


def small_config(**changes) -> ModelConfig:
    """2 layers, 2 kv heads, 4 experts top-2, a vocabulary that two ranks do not divide."""
    values = dict(
        vocab_size=VOCABULARY + 1,
        hidden_size=24,
        num_layers=2,
        attention=MixtureOfAttentionConfig(num_kv_heads=2, head_dim=8, num_experts=4, top_k=2),
        mlp=MixtureOfMLPConfig(ffn_hidden_size=22, num_experts=4, top_k=2),
        max_sequence_length=64,
        norm_eps=1e-4,
        rope_theta=700.0,
        init_std=0.2,
    )
    return ModelConfig(**{**values, **changes})


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, torch.Tensor]:
    """Global name -> tensor: loud matrices, norms near 1, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        noise = 0.3 * torch.randn(shape, generator=generator)
        weights[name] = (noise + (1.0 if name.endswith("norm.weight") else 0.0)).to(dtype)
    return weights


def write_tokenizer(folder: Path) -> Path:
    """A sentencepiece model of VOCABULARY pieces."""
    from data_pipeline.tokenizer import train_tokenizer

    text = folder / "text.txt"
    text.write_text(TEXT * 20, encoding="utf-8")
    train_tokenizer([text], folder / "tokenizer.model", VOCABULARY)
    return folder / "tokenizer.model"


def write_checkpoint(
    path: Path, config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: Path | None = None
) -> Path:
    """Write them as ``checkpoint convert`` would."""
    from moe_train.checkpoint.weights import write_weights

    dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    write_weights(path, config, weights.items(), dtypes, tokenizer=tokenizer)
    return path
