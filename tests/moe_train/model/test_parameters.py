"""Initial weights, names and counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_train.config import load_model
from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig, ModelConfig
from tests.small_models import SMALL

SHAPES = {
    "embedding.weight": (1000, 12),
    "layers.3.mlp.gate_up.weight": (3, 600, 10),
    "layers.3.attention.kv.weight": (2, 300, 14),
}


def drawn(name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None, seed: int = 1):
    from moe_train.model.parameters import initialize, new_parameter

    parameter = new_parameter(
        name, SHAPES[name], offset=offset, shape=shape, dtype=torch.float32, device=torch.device("cpu")
    )
    initialize(parameter, seed=seed, std=0.02)
    return parameter.data


@pytest.mark.parametrize("name", SHAPES)
def test_a_slice_is_drawn_as_the_whole_is(topology, name):
    """Slices that begin and end inside of the blocks of rows that are drawn together, in every dimension."""
    whole = drawn(name)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        low = [int(torch.randint(0, extent, (), generator=generator)) for extent in whole.shape]
        high = [int(torch.randint(at + 1, extent + 1, (), generator=generator)) for at, extent in zip(low, whole.shape)]
        expected = whole[tuple(slice(a, b) for a, b in zip(low, high))]
        part = drawn(name, tuple(low), tuple(b - a for a, b in zip(low, high)))
        assert torch.equal(part, expected), (low, high)


def test_draws_are_normal_and_differ(topology):
    whole = drawn("layers.3.mlp.gate_up.weight")
    assert whole.std().item() == pytest.approx(0.02, rel=0.02) and abs(whole.mean().item()) < 1e-3
    assert whole.flatten().unique().numel() > 0.99 * whole.numel(), "the same numbers were drawn twice"
    assert not torch.equal(whole, drawn("layers.3.mlp.gate_up.weight", seed=2))
    assert not torch.equal(drawn("embedding.weight")[:300, :10], whole.flatten(0, 1)[:300])


def test_padding_norms_and_biases(topology):
    from moe_train.model.parameters import initialize, new_parameter

    def new(name, global_shape, **where):
        parameter = new_parameter(name, global_shape, dtype=torch.float32, device=torch.device("cpu"), **where)
        with torch.no_grad():
            parameter.fill_(7.0)
        initialize(parameter, seed=1, std=0.02)
        return parameter.detach()

    assert torch.equal(new("layers.0.mlp_norm.weight", (5,)), torch.ones(5))
    assert torch.equal(new("layers.0.mlp.bias", (5,)), torch.zeros(5))
    padded = new("embedding.weight", (10, 4), offset=(6, 0), shape=(4, 4), local_shape=(6, 4))
    assert padded[:4].abs().min() > 0 and padded[4:].abs().max() == 0


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_the_config(topology, tied):
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions

    config = ModelConfig(
        vocab_size=31,
        hidden_size=14,
        num_layers=3,
        attention=MixtureOfAttentionConfig(num_kv_heads=3, head_dim=6, num_experts=4, top_k=3),
        mlp=MixtureOfMLPConfig(ffn_hidden_size=10, num_experts=6, top_k=1),
        tie_embeddings=tied,
    )
    model = build_model(config, topology, ModelOptions())[0]
    placements = [parameter.placement for parameter in model.parameters()]
    assert {p.name: p.global_shape for p in placements} == config.parameter_shapes()
    assert len(placements) == len(config.parameter_shapes())
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("family", SMALL)
def test_the_other_families_have_them_too(topology, family):
    from moe_train.model.build import build_model
    from moe_train.model.flops import layer_weights
    from moe_train.model.options import ModelOptions

    config = SMALL[family]()
    model = build_model(config, topology, ModelOptions())[0]
    shapes = {p.placement.name: p.placement.global_shape for p in model.parameters()}
    assert shapes == config.parameter_shapes()
    inner = [name for name in shapes if name.startswith("layers.1.")]
    assert inner == list(layer_weights(config, 1)), "not in the order in which the module has them"
    for parameter in model.parameters():
        values = parameter.detach()
        if parameter.placement.name.endswith("norm.weight"):
            assert torch.equal(values, torch.ones_like(values))
        elif parameter.placement.name.endswith(".bias"):
            assert torch.equal(values, torch.zeros_like(values))
        else:
            assert 0.8 * config.init_std < values.std() < 1.2 * config.init_std, parameter.placement.name


@pytest.mark.parametrize("name", ["jetmoe_8b", "jetmoe_4b"])
def test_counts_of_the_large_presets(topology, name):
    """Built on the meta device (megatron-core's own layers on the CPU: untouched memory costs nothing)."""
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions

    config = load_model(name)
    model = build_model(config, replace(topology, device=torch.device("meta")), ModelOptions(dtype=torch.bfloat16))[0]
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters()
    assert {p.placement.name: p.placement.global_shape for p in model.parameters()} == config.parameter_shapes()
    experts = [p for p in model.parameters() if getattr(p, "allreduce", True) is False]
    idle = sum(p.numel() * (8 - 2) // 8 for p in experts)
    assert config.num_parameters() - idle == config.num_active_parameters()
    assert math.isclose(config.num_active_parameters() / config.num_parameters(), 0.2776, abs_tol=0.01)
