"""The section `router`: a mixture's own over the model's, and what does not go together."""

from __future__ import annotations

import pytest

from moe_train.config import load_model
from moe_train.model.config import ModelConfig
from moe_train.model.router_config import RouterConfig


def test_by_default_it_is_jetmoes() -> None:
    router = RouterConfig()
    assert (router.load_balancing, router.load_balancing_coef, router.z_coef, router.scope) == (
        "switch",
        0.01,
        0.001,
        "micro_batch",
    )
    assert not router.normalize_logits and router.capacity_factor is router.drop_by is router.adaptive is None


def test_a_mixtures_own_router_says_what_differs() -> None:
    model = ModelConfig.model_validate(
        {
            "router": {"z_coef": 0.5, "scope": "sequence"},
            "mlp": {"router": {"load_balancing": "skywork", "z_coef": 0.25}},
        }
    )
    assert model.router_of("attention") == model.router == RouterConfig(z_coef=0.5, scope="sequence")
    assert model.router_of("mlp") == RouterConfig(z_coef=0.25, scope="sequence", load_balancing="skywork")
    assert (
        ModelConfig.model_validate(model.model_dump())
        == model
        == ModelConfig.model_validate(model.model_dump(mode="json"))
    )


def test_a_bias_of_one_router_is_a_parameter_of_it_alone() -> None:
    model = ModelConfig.model_validate({"num_layers": 1, "mlp": {"router": {"bias": True}}})
    assert "layers.0.mlp.router.bias" in model.parameter_shapes()
    assert "layers.0.attention.router.bias" not in model.parameter_shapes()


def test_two_experts_may_have_a_router_without_normalised_logits() -> None:
    overrides = ["router.normalize_logits=true", "mlp.num_experts=2", "mlp.router.normalize_logits=false"]
    assert load_model("demo", overrides).router_of("attention").normalize_logits


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router.capacity_factor=0.9"], "router.capacity_factor: 0.9 has no room for the top_k experts"),
        (["router.drop_by=position"], "router.drop_by: position needs a capacity_factor"),
        (["router.adaptive.xi=0.5"], "router.adaptive: follows the drop rate, which needs a capacity_factor"),
        (
            ["router.capacity_factor=1.5", "router.adaptive.xi=0.5", "router.load_balancing=none"],
            "router.adaptive: sets the coefficient of a loss, and load_balancing is none",
        ),
        (["router.logit_scale=2"], "router.logit_scale: 2 is of use only with normalize_logits"),
        (["router.drop_by=random"], "drop_by"),
        (["router.load_balance=switch"], "load_balancing"),
        (
            ["mlp.num_experts=2", "router.normalize_logits=true"],
            "mlp.num_experts 2 leaves of normalize_logits: true only",
        ),
        (
            ["attention.num_experts=2", "attention.router.normalize_logits=true"],
            "take 3 experts or more, or attention.router.normalize_logits: false",
        ),
        (["mlp.router.capacity_factor=0.5"], "mlp.router.capacity_factor: 0.5 has no room"),
    ],
)
def test_what_does_not_go_together_is_told_in_a_line(overrides, message) -> None:
    with pytest.raises(ValueError) as caught:
        load_model("demo", overrides)
    assert caught.value.exit_code == 2
    assert message in str(caught.value) and "\n" not in str(caught.value)
