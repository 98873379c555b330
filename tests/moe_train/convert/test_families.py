"""Llama, Mixtral and OLMoE there and back: no bit changes, and what cannot be expressed is refused by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint.weights import WeightsReader
from moe_train.convert.hf_config import hf_config, model_config
from moe_train.convert.huggingface import from_hf, to_hf
from moe_train.errors import UserError
from moe_train.model.config import (
    DenseMLPConfig,
    GroupedQueryAttentionConfig,
    MixtureOfAttentionConfig,
    MixtureOfMLPConfig,
    ModelConfig,
    RouterConfig,
)
from tests.moe_train.convert.test_huggingface import bits, fails, tensors_of
from tests.small_checkpoint import random_weights, small_config, write_checkpoint
from tests.small_models import llama, mixtral, olmoe, skywork

MODELS = {
    "llama": llama(),
    "llama, tied": llama(tie_embeddings=True, attention=GroupedQueryAttentionConfig(num_heads=4, num_kv_heads=4)),
    "mixtral": mixtral(),
    "mixtral, one kv head": mixtral(attention=GroupedQueryAttentionConfig(num_heads=3, num_kv_heads=1, head_dim=6)),
    "olmoe": olmoe(),
    "olmoe, renormalised": olmoe(router=RouterConfig(renormalize=True, scope="sequence", z_coef=0.0)),
}

SIZES = dict(
    vocab_size=41,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=10,
    initializer_range=0.3,
    rms_norm_eps=1e-4,
)


def hf_folder(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """A folder as transformers itself writes it."""
    import transformers

    names = {"llama": "Llama", "mixtral": "Mixtral", "olmoe": "Olmoe"}
    experts = {"llama": {}, "mixtral": {"num_local_experts": 4}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 3}}
    config = getattr(transformers, f"{names[family]}Config")(**{**SIZES, **experts[family], **changes})
    getattr(transformers, f"{names[family]}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_out_and_in_again_changes_no_bit(tmp_path, config, dtype):
    weights = random_weights(config, dtype)
    weights["final_norm.weight"][:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    to_hf(write_checkpoint(tmp_path / "ours", config, weights), tmp_path / "hf", 9_000)
    from_hf(tmp_path / "hf", tmp_path / "again")
    reader = WeightsReader(tmp_path / "again")
    assert reader.config == config.model_copy(update={} if config.mlp.num_experts else {"router": RouterConfig()})
    assert list(weights) == reader.names
    for name, tensor in weights.items():
        assert reader.dtype(name) == dtype and bits(reader.read(name)) == bits(tensor), name


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}], ids=["untied", "tied"]
)
@pytest.mark.parametrize("family", ["llama", "mixtral", "olmoe"])
def test_in_and_out_again_changes_no_bit(tmp_path, family, changes):
    source = hf_folder(tmp_path / "source", family, **changes)
    from_hf(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "again")
    before, after = tensors_of(source), tensors_of(tmp_path / "again")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and bits(after[name]) == bits(tensor), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    known = {key for key, value in old.items() if value is not None and not key.endswith("_token_id")}
    known -= {"transformers_version"}
    assert {key: new.get(key) for key in known} == {key: old[key] for key in known}


@pytest.mark.parametrize("config", [small_config(), *(MODELS[name] for name in ("llama", "mixtral", "olmoe"))])
def test_without_a_tokenizer_the_special_ids_are_the_familys(tmp_path, config):
    from transformers import AutoConfig

    to_hf(write_checkpoint(tmp_path / "ours", config, random_weights(config)), tmp_path / "hf")
    read, theirs = (
        json.loads((tmp_path / "hf" / "config.json").read_text()),
        AutoConfig.from_pretrained(tmp_path / "hf"),
    )
    defaults, names = type(theirs)(), ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [read[name] for name in names] == [getattr(defaults, name) for name in names]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert [generation.get(name) for name in names] == [getattr(defaults, name) for name in names]


# --- config.json --------------------------------------------------------------------------------------------


def test_what_config_json_leaves_out_is_what_transformers_takes():
    import transformers

    for family in ("Llama", "Mixtral", "Olmoe"):
        theirs = getattr(transformers, f"{family}Config")()
        ours = model_config({"model_type": family.lower()}, "config.json")
        assert ours == model_config(theirs.to_dict(), "config.json")
        assert ours.attention.num_heads == theirs.num_attention_heads
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.norm_eps == ours.layer_norm_eps == theirs.rms_norm_eps


def test_the_rotary_base_by_all_its_names():
    import transformers

    for keys in (
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_scaling": {"type": "default", "rope_theta": 500.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_scaling": {}, "rope_theta": 500.0},
    ):
        assert model_config({"model_type": "llama", **SIZES, **keys}, "config.json").rope_theta == 500.0
        assert transformers.LlamaConfig(**SIZES, **keys).rope_parameters["rope_theta"] == 500.0


REFUSED = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "sliding_window": 128,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
        "attention_dropout": 0.1,
        "hidden_act": "gelu_new",
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "hidden_size": "16",
        "quantization_config": {"bits": 4},
        "num_hidden_layers": 0,
    },
    "mixtral": {"sliding_window": 4096, "router_jitter_noise": 0.01, "num_experts_per_tok": 9},
    "olmoe": {
        "clip_qkv": 8.0,
        "attention_bias": True,
        "num_experts_per_tok": 65,
        "head_dim": 7,
        "num_local_experts": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


@pytest.mark.parametrize("family, key", [(family, key) for family, keys in REFUSED.items() for key in keys])
def test_a_config_that_is_not_supported_is_refused_by_its_key(family, key):
    values = {"model_type": family, **SIZES, "num_experts" if family == "olmoe" else "unused": 8}
    text = fails(model_config, {**values, key: REFUSED[family][key]}, "there/config.json")
    assert text.startswith("there/config.json: ") and key in text


def test_a_model_that_is_of_no_family():
    one_norm = mixtral(attention=mixtral().attention.model_copy(update={"qk_norm": True}), norm_eps=1e-6)
    cases = {
        "router.bias is always false, not true": skywork(layer_norm_eps=1e-5),
        "attention.kind mixture and mlp.kind dense": ModelConfig(
            attention=MixtureOfAttentionConfig(), mlp=DenseMLPConfig()
        ),
        "norm_eps 1e-06 and layer_norm_eps 1e-05 differ": one_norm,
        "mlp.bias is always false": mixtral(mlp=MixtureOfMLPConfig(ffn_hidden_size=20, num_experts=4)),
        "router.renormalize is always true": mixtral(router=RouterConfig(renormalize=False)),
        "router.normalize_logits is always false": mixtral(router=RouterConfig(normalize_logits=True)),
        "num_heads x head_dim, 24, must be": olmoe(
            attention=GroupedQueryAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True)
        ),
        "attention.num_heads 5 must divide": llama(
            attention=GroupedQueryAttentionConfig(num_heads=5, num_kv_heads=1, head_dim=8)
        ),
        "attention.bias is always true": ModelConfig(attention=MixtureOfAttentionConfig(bias=False)),
        "the routers of attention and mlp differ": ModelConfig(mlp=MixtureOfMLPConfig(router=RouterConfig(z_coef=0.5))),
    }
    for words, config in cases.items():
        assert words in fails(hf_config, config, "float32", {})


def test_a_mixture_whose_experts_are_of_two_types_is_refused(tmp_path):
    from safetensors.torch import save_file

    source = hf_folder(tmp_path / "source", "mixtral")
    tensors = tensors_of(source)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} is torch.float32, others of layers.1.mlp.gate_up.weight are torch.bfloat16" in fails(
        from_hf, source, tmp_path / "ours"
    )


def test_an_expert_that_is_missing_is_named(tmp_path):
    from safetensors.torch import save_file

    source = hf_folder(tmp_path / "source", "olmoe")
    tensors = tensors_of(source)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.layers.1.mlp.experts.3.up_proj.weight is missing"):
        from_hf(source, tmp_path / "ours")
