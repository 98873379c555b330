"""The model against Hugging Face's JetMoE with the same random weights: logits, loss and every gradient."""

from __future__ import annotations

import pytest
import torch

from moe_train.convert.names import counterparts
from moe_train.model.config import MixtureOfAttentionConfig, MixtureOfMLPConfig, ModelConfig, RouterConfig


def model_config(
    *,
    vocab=51,
    hidden=24,
    layers=2,
    experts=4,
    top_k=2,
    heads=3,
    head_dim=8,
    ffn=20,
    activation="silu",
    **changes,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        attention=MixtureOfAttentionConfig(num_kv_heads=heads, head_dim=head_dim, num_experts=experts, top_k=top_k),
        mlp=MixtureOfMLPConfig(ffn_hidden_size=ffn, num_experts=experts, top_k=top_k, activation=activation),
        router=RouterConfig(load_balancing_coef=0.0, z_coef=0.0),
        **{"init_std": 0.2, **changes},
    )


SHAPES = {
    "plain": (model_config(), 2, 11),
    "top 1": (model_config(top_k=1), 2, 11),
    "top 3, odd sizes, other eps and theta, untied": (
        model_config(
            vocab=37,
            hidden=21,
            layers=3,
            experts=5,
            top_k=3,
            ffn=19,
            norm_eps=1e-3,
            rope_theta=500.0,
            tie_embeddings=False,
        ),
        3,
        7,
    ),
    "all experts, one head, gelu": (
        model_config(experts=3, top_k=3, heads=1, head_dim=6, activation="gelu"),
        1,
        17,
    ),
    "heads wider than the model, relu, large eps": (
        model_config(hidden=10, heads=5, head_dim=4, activation="relu", norm_eps=0.1),
        2,
        5,
    ),
    "one token": (model_config(), 4, 1),
}


def huggingface_twin(config: ModelConfig, ours: dict[str, torch.nn.Parameter]):
    """Hugging Face's model with our weights, and its parameters under our names."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    twin = JetMoeForCausalLM(
        JetMoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_key_value_heads=config.attention.num_kv_heads,
            kv_channels=config.attention.head_dim,
            num_local_experts=config.attention.num_experts,
            num_experts_per_tok=config.attention.top_k,
            intermediate_size=config.mlp.ffn_hidden_size,
            activation_function=config.mlp.activation,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.max_sequence_length,
        )
    )
    theirs = dict(twin.named_parameters())
    pairs = counterparts(config)
    assert {pair.hf_name for pair in pairs} == set(theirs), "a parameter has no counterpart"
    assert {pair.name for pair in pairs} == set(ours)
    with torch.no_grad():
        for pair in pairs:
            theirs[pair.hf_name].copy_(ours[pair.name].view(pair.hf_shape))
    return twin, {pair.name: theirs[pair.hf_name] for pair in pairs}


@pytest.fixture(params=SHAPES, scope="module")
def both(request, topology):
    """(config, our model, its parameters by name, the twin, its parameters by our names, token ids)."""
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions

    config, batch, length = SHAPES[request.param]
    model = build_model(config, topology, ModelOptions())[0]
    ours = {parameter.placement.name: parameter for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in ours.items():  # initial biases are 0 and norms 1: nothing would show
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    twin, theirs = huggingface_twin(config, ours)
    ids = torch.randint(0, config.vocab_size, (batch, length + 1), generator=generator)
    return config, model, ours, twin, theirs, ids


def test_logits(both):
    _, model, _, twin, _, ids = both
    with torch.no_grad():
        logits, expected = model(ids[:, :-1]), twin(ids[:, :-1], use_cache=False).logits
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    assert expected.abs().max() > 0.5, "a model that says nothing compares well with anything"
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)


def test_loss_and_gradients(both):
    config, model, ours, twin, theirs, ids = both
    model.zero_grad(set_to_none=True)
    twin.zero_grad(set_to_none=True)
    loss, nll_bs = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    logits = twin(ids[:, :-1], use_cache=False).logits
    expected_bs = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    expected_bs.mean().backward()
    torch.testing.assert_close(nll_bs, expected_bs.detach(), atol=5e-5, rtol=0)
    assert loss.item() == pytest.approx(expected_bs.mean().item(), abs=1e-5)
    # With one expert the gate is 1 whatever the router says.
    silent = {"router"} if config.mlp.top_k == 1 else set()
    for name, parameter in ours.items():
        grad, expected = parameter.grad.view(theirs[name].shape), theirs[name].grad
        if not silent & set(name.split(".")) and ids.shape[1] > 2:
            assert expected.abs().max() > 0, name
        error = (grad - expected).abs().max().item()
        assert error <= 1e-5 * expected.abs().max().item() + 1e-8, (name, error, expected.abs().max().item())
