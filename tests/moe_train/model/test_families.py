"""Llama, Mixtral and OLMoE against transformers' own, with the same random weights: logits, loss, every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from moe_train.checkpoint.weights import WeightsReader
from moe_train.convert.huggingface import from_hf, to_hf
from moe_train.convert.names import counterparts
from moe_train.model.config import (
    DenseMLPConfig,
    GroupedQueryAttentionConfig,
    MixtureOfMLPConfig,
    ModelConfig,
    RouterConfig,
)
from tests.moe_train.convert.test_families import hf_folder
from tests.small_checkpoint import random_weights, write_checkpoint
from tests.small_models import llama, mixtral, olmoe

grouped = partial(GroupedQueryAttentionConfig, head_dim=8)
SHAPES = {
    "llama": (llama(), 2, 11),
    "llama, every head its own keys, gelu, tied": (
        llama(
            attention=grouped(num_heads=2, num_kv_heads=2),
            mlp=DenseMLPConfig(ffn_hidden_size=13, activation="gelu"),
            tie_embeddings=True,
            num_layers=1,
        ),
        1,
        17,
    ),
    "llama, one kv head, heads wider than the model, large eps": (
        llama(
            hidden_size=12,
            attention=grouped(num_heads=6, num_kv_heads=1),
            norm_eps=0.1,
            layer_norm_eps=0.1,
            num_layers=2,
        ),
        3,
        5,
    ),
    "mixtral": (mixtral(), 2, 11),
    "mixtral, top 1, relu, odd sizes": (
        mixtral(
            hidden_size=21,
            vocab_size=37,
            num_layers=2,
            mlp=MixtureOfMLPConfig(ffn_hidden_size=9, num_experts=3, top_k=1, bias=False, activation="relu"),
        ),
        2,
        9,
    ),
    "olmoe": (olmoe(), 2, 11),
    "olmoe, every head its own keys, gates renormalised": (
        olmoe(
            attention=grouped(num_heads=4, num_kv_heads=4, qk_norm=True),
            router=RouterConfig(renormalize=True),
            num_layers=2,
            rope_theta=1e4,
        ),
        2,
        13,
    ),
    "olmoe, one token, every expert": (
        olmoe(mlp=MixtureOfMLPConfig(ffn_hidden_size=5, num_experts=3, top_k=3, bias=False), num_layers=1),
        4,
        1,
    ),
}


def built(config: ModelConfig, topology, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Our model with these weights, routers without losses of their own."""
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions

    quiet = config.router.model_copy(update={"load_balancing_coef": 0.0, "z_coef": 0.0})
    model = build_model(config.model_copy(update={"router": quiet}), topology, ModelOptions())[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(parameter.placement.shape).copy_(weights[parameter.placement.name])
    return model


def gradients_by_tensor(twin: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the names that transformers saves; in memory it packs the experts of a layer."""
    gradients = {}
    for name, parameter in twin.named_parameters():
        if ".experts." not in name:
            gradients[name.replace("mlp.gate.", "block_sparse_moe.gate.")] = parameter.grad
            gradients[name] = parameter.grad
            continue
        layer = name.split(".mlp.")[0]
        for expert, grad in enumerate(parameter.grad):
            parts = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
            kinds = parts[name.rpartition(".")[2]]
            for (olmoe_name, mixtral_name), part in zip(kinds, grad.chunk(len(kinds))):
                gradients[f"{layer}.mlp.experts.{expert}.{olmoe_name}.weight"] = part
                gradients[f"{layer}.block_sparse_moe.experts.{expert}.{mixtral_name}.weight"] = part
    return gradients


@pytest.fixture(params=SHAPES, scope="module")
def both(request, topology, tmp_path_factory):
    """(config, our model, the twin as transformers loads it from an export, token ids)."""
    from transformers import AutoModelForCausalLM

    config, batch, length = SHAPES[request.param]
    weights = random_weights(config, seed=3)
    folder = tmp_path_factory.mktemp("families")
    to_hf(write_checkpoint(folder / "ours", config, weights), folder / "hf")
    twin = AutoModelForCausalLM.from_pretrained(folder / "hf", experts_implementation="eager")
    ids = torch.randint(0, config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(7))
    return config, built(config, topology, weights), twin, ids


def test_logits(both):
    _, model, twin, ids = both
    with torch.no_grad():
        logits, expected = model(ids[:, :-1]), twin(ids[:, :-1], use_cache=False).logits
    assert logits.shape == expected.shape and logits.dtype == torch.float32
    assert expected.abs().max() > 0.5, "a model that says nothing compares well with anything"
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)


def test_loss_and_gradients(both):
    config, model, twin, ids = both
    model.zero_grad(set_to_none=True)
    twin.zero_grad(set_to_none=True)
    loss, nll_bs = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    logits = twin(ids[:, :-1], use_cache=False).logits
    expected_bs = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    expected_bs.mean().backward()
    torch.testing.assert_close(nll_bs, expected_bs.detach(), atol=5e-5, rtol=0)
    theirs = gradients_by_tensor(twin)
    ours = {p.placement.name: p.grad.view(p.placement.shape) for p in model.parameters()}
    largest = max(grad.abs().max().item() for grad in ours.values())
    for pair in counterparts(config):
        grad, expected = pair.theirs(ours[pair.name]), theirs[pair.hf_name]
        error = (grad - expected).abs().max().item()
        assert error <= 2e-5 * expected.abs().max().item() + 1e-6 * largest, (pair.hf_name, error)


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe"])
def test_a_folder_of_transformers_computes_the_same_here(tmp_path, topology, family):
    from transformers import AutoModelForCausalLM

    from moe_train.checkpoint.load import load_checkpoint
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions

    source = hf_folder(tmp_path / "source", family, torch.float32)
    from_hf(source, tmp_path / "ours")
    model = build_model(WeightsReader(tmp_path / "ours").config, topology, ModelOptions())[0]
    load_checkpoint(tmp_path / "ours", [model], None, topology)
    twin = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    ids = torch.randint(0, 41, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids), twin(ids, use_cache=False).logits
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_documents_of_a_window_are_apart(topology):
    """Grouped-query attention with a document mask: a window of two is each by itself."""
    from moe_train.model.build import build_model
    from moe_train.model.options import ModelOptions

    config, end = llama(), 50
    weights = random_weights(config)
    model = build_model(config, topology, ModelOptions(document_end=end))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(parameter.placement.shape).copy_(weights[parameter.placement.name])
        ids = torch.randint(0, end, (2, 13), generator=torch.Generator().manual_seed(1))
        ids[:, 5] = end
        whole, first, second = model(ids), model(ids[:, :6]), model(ids[:, 6:])
    torch.testing.assert_close(whole, torch.cat([first, second], dim=1), atol=2e-5, rtol=0)


def test_a_gate_has_its_bias(topology):
    """Skywork-MoE eq. 1: a large bias sends every token to its expert."""
    config = mixtral(router=RouterConfig(bias=True), num_layers=1)
    weights = random_weights(config)
    weights["layers.0.mlp.router.bias"] = torch.tensor([0.0, 30.0, 0.0, 60.0])
    model = built(config, topology, weights)
    chosen = []
    model.layers[0].mlp.router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1]))
    with torch.no_grad():
        model(torch.arange(12).view(2, 6))
    assert torch.equal(chosen[0], torch.tensor([3, 1]).expand(12, 2))
