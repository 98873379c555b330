"""The model's configuration and its counting."""

from __future__ import annotations

import math

import pytest
import yaml
from pydantic import ValidationError

from data_pipeline.yaml_marks import YamlError
from moe_train.config import load_model
from moe_train.model.config import (
    DenseMLPConfig,
    GroupedQueryAttentionConfig,
    MixtureOfAttentionConfig,
    MixtureOfMLPConfig,
    ModelConfig,
)

SMALL = ModelConfig(
    vocab_size=101,
    hidden_size=24,
    num_layers=3,
    attention=MixtureOfAttentionConfig(num_kv_heads=3, head_dim=10, num_experts=5, top_k=3),
    mlp=MixtureOfMLPConfig(ffn_hidden_size=44, num_experts=7, top_k=1),
)


def test_jetmoe_8b_counts() -> None:
    config = load_model("jetmoe_8b")
    assert config == ModelConfig()
    assert config.num_parameters() == 8_522_237_952
    assert config.num_active_parameters() == 2_331_445_248
    assert config.flops_per_token(4096) == pytest.approx(16.4e9, rel=1e-3)


def test_jetmoe_4b_counts() -> None:
    config = load_model("jetmoe_4b")
    assert (config.num_parameters(), config.num_active_parameters()) == (4_293_888_000, 1_198_491_648)


@pytest.mark.parametrize(
    ("name", "total", "active", "published"),
    [
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248, ("46.7", "12.9")),
        ("olmoe_1b_7b", 6_919_161_856, 1_282_017_280, ("6.9", "1.3")),
        ("skywork_moe_146b", 146_356_168_000, 22_691_308_864, ("146.4", "22.7")),
        ("skywork_dense_13b", 13_854_269_952, 13_854_269_952, ("13.9", "13.9")),
    ],
)
def test_counts_are_the_published_ones(name: str, total: int, active: int, published: tuple[str, str]) -> None:
    config = load_model(name)
    assert (config.num_parameters(), config.num_active_parameters()) == (total, active)
    assert (f"{total / 1e9:.1f}", f"{active / 1e9:.1f}") == published


def test_the_mixture_of_skywork_is_its_dense_model_but_for_the_mlps() -> None:
    dense, mixture = load_model("skywork_dense_13b"), load_model("skywork_moe_146b")
    assert dense.model_copy(update={"mlp": mixture.mlp, "router": mixture.router}) == mixture
    assert dense.mlp.ffn_hidden_size == mixture.mlp.ffn_hidden_size and not dense.routers()
    assert list(mixture.routers()) == [f"layers.{layer}.mlp" for layer in range(52)]


def test_bench_60m_is_around_60m() -> None:
    assert 50e6 < load_model("bench_60m").num_parameters() < 70e6


def test_counts_follow_the_formula_where_attention_and_mlp_differ() -> None:
    """The parameter count, written out for experts and top_k of their own in each half."""
    h, v, layers, d, f = 24, 101, 3, 30, 44

    def per_layer(attention_experts: int, mlp_experts: int) -> int:
        return 2 * attention_experts * d * h + 2 * d * h + 3 * mlp_experts * f * h + (5 + 7) * h + 4 * h

    assert SMALL.num_parameters() == layers * per_layer(5, 7) + v * h + h
    assert SMALL.num_active_parameters() == layers * per_layer(3, 1) + v * h + h
    untied = SMALL.model_copy(update={"tie_embeddings": False})
    assert untied.num_parameters() - SMALL.num_parameters() == v * h


def test_parameter_shapes() -> None:
    shapes = SMALL.parameter_shapes()
    assert shapes["embedding.weight"] == (101, 24)
    assert shapes["layers.2.attention.kv.weight"] == (2, 30, 24)
    assert shapes["layers.0.attention.query.weight"] == (5, 30, 24)
    assert shapes["layers.0.attention.output.weight"] == (5, 24, 30)
    assert shapes["layers.0.attention.router.weight"] == (5, 24)
    assert shapes["layers.1.mlp.router.weight"] == (7, 24)
    assert shapes["layers.1.mlp.gate_up.weight"] == (7, 88, 24)
    assert shapes["layers.1.mlp.down.weight"] == (7, 24, 44)
    assert shapes["final_norm.weight"] == (24,)
    assert "head.weight" not in shapes and "layers.3.mlp.bias" not in shapes
    assert len(shapes) == 3 * 11 + 2
    assert sum(map(math.prod, shapes.values())) == SMALL.num_parameters()
    assert SMALL.model_copy(update={"tie_embeddings": False}).parameter_shapes()["head.weight"] == (101, 24)


def test_flops_per_token_by_hand() -> None:
    """One layer, by listing every matrix product of one token."""
    config = SMALL.model_copy(update={"num_layers": 1})
    products = [(24, 5), (24, 7)]  # routers
    products += [(24, 30)] * 2 + [(24, 30), (30, 24)] * 3  # keys, values; query and output of 3 experts
    products += [(24, 44), (24, 44), (44, 24)]  # gate, up, down of 1 expert
    products += [(24, 101)]  # head
    forward = sum(2 * rows * columns for rows, columns in products)
    forward += 2 * (2 * 3 * 3 * 10 * 64 // 2)  # 3 slots of 3 heads of 10: scores and values, half of 64 positions
    assert config.flops_per_token(64) == 3 * forward


def test_flops_of_a_dense_model_by_hand() -> None:
    config = ModelConfig(
        vocab_size=101,
        hidden_size=24,
        num_layers=1,
        attention=GroupedQueryAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=10),
        mlp=DenseMLPConfig(ffn_hidden_size=44),
    )
    products = [(24, 40), (24, 20), (24, 20), (40, 24), (24, 44), (24, 44), (44, 24), (24, 101)]
    forward = sum(2 * rows * columns for rows, columns in products) + 2 * (2 * 40 * 64 // 2)
    assert config.flops_per_token(64) == 3 * forward


def test_a_part_without_a_kind_is_a_mixture() -> None:
    assert ModelConfig.model_validate({"mlp": {"top_k": 1}}).mlp == MixtureOfMLPConfig(top_k=1)
    assert ModelConfig.model_validate({"mlp": {"kind": "dense"}}).mlp == DenseMLPConfig()


@pytest.mark.parametrize(
    ("line", "value", "words"),
    [
        ("attention", {"kind": "gpa"}, "attention.kind: 'gpa' is not accepted; it should be 'mixture' or 'gqa'"),
        (
            "mlp",
            {"kind": "dense", "ffn_hidden_size": 8, "top_k": 2},
            "mlp.top_k: unknown key; known keys: kind, ffn_hidden_size",
        ),
        ("attention", {"kind": "gqa", "num_headz": 2}, "attention.num_headz: unknown key; did you mean 'num_heads'?"),
        (
            "attention",
            {"kind": "gqa", "num_heads": 6, "num_kv_heads": 4},
            "num_kv_heads 4 does not divide num_heads 6; the nearest that",
        ),
        ("attention", {"kind": "gqa", "head_dim": 5}, "attention.head_dim: head_dim 5 is odd"),
        ("attention", {"num_experts": "8"}, "attention.num_experts: '8' is not accepted"),
        ("mlp", 5, "mlp: 5 is not accepted; it should be a mapping of keys"),
    ],
)
def test_a_mistake_in_a_model_file_is_told_with_its_key_and_line(tmp_path, line: str, value, words: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"vocab_size": 50, line: value}, sort_keys=False))
    with pytest.raises(YamlError) as caught:
        load_model(path)
    text = str(caught.value)
    assert words in text and "\n" not in text and "model.yaml:" in text and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("part", "values", "text"),
    [
        (MixtureOfAttentionConfig, {"head_dim": 5}, "the nearest that would do: 6"),
        (MixtureOfAttentionConfig, {"num_experts": 4, "top_k": 5}, "the nearest that would do: 4"),
        (MixtureOfMLPConfig, {"num_experts": 1}, "top_k 2 is more than num_experts 1"),
        (MixtureOfMLPConfig, {"top_k": 0}, "greater than or equal to 1"),
        (MixtureOfMLPConfig, {"activation": "relu2"}, "'silu', 'gelu' or 'relu'"),
        (ModelConfig, {"rope_theta": float("nan")}, "finite"),
        (ModelConfig, {"vocab_size": "32000"}, "integer"),
        (ModelConfig, {"n_layers": 3}, "Extra inputs"),
    ],
)
def test_refused(part: type, values: dict, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        part(**values)


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SMALL.num_layers = 4  # type: ignore[misc]
