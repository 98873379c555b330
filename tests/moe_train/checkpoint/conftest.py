"""A run's folder with real checkpoints in it, made without ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.folder import checkpoint_name, point_to
from moe_train.checkpoint.weights import write_weights
from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig, ModelConfig

MODEL = ModelConfig(
    vocab_size=7,
    hidden_size=4,
    num_layers=1,
    attention=MixtureOfAttentionConfig(num_kv_heads=1, head_dim=2, num_experts=2, top_k=1),
    mlp=MixtureOfMLPConfig(ffn_hidden_size=3, num_experts=2, top_k=1),
)


def add_checkpoint(folder: Path, step: int) -> Path:
    """A whole checkpoint of ``step`` (weights alone: what matters here are its files)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / checkpoint_name(step)
    weights = ((name, torch.full(shape, float(step))) for name, shape in MODEL.parameter_shapes().items())
    write_weights(path, MODEL, weights, torch.float32, extra_state={"step": step, "tokens": 1000 * step})
    point_to(path)
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of steps 100, 200 and 300."""
    for step in (100, 200, 300):
        add_checkpoint(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"
