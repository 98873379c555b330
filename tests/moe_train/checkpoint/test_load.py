"""What is loaded from, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
import torch

from moe_train.checkpoint.folder import read_run_state
from moe_train.checkpoint.load import check_same_model, load_checkpoint
from moe_train.checkpoint.random_state import random_state, restore_random_state
from moe_train.errors import UserError
from moe_train.model.config import MixtureOfAttentionConfig, RouterConfig
from moe_train.model.depth_config import DepthConfig
from tests.moe_train.checkpoint.conftest import MODEL


@pytest.fixture
def state(run) -> dict:
    return read_run_state(run / "checkpoints" / "iter_0000300")


def test_the_same_model(state) -> None:
    check_same_model(state, MODEL)


@pytest.mark.parametrize("free", [{"router": RouterConfig(z_coef=0.5)}, {"max_sequence_length": 8}, {"init_std": 0.5}])
def test_what_no_weight_depends_on_may_differ(state, free) -> None:
    check_same_model(state, MODEL.model_copy(update=free))


def test_a_checkpoint_from_before_a_key_existed_has_its_default(state) -> None:
    old = {**state["model"], "attention": {**state["model"]["attention"]}}
    del old["attention"]["kind"], old["layer_norm_eps"]
    check_same_model({**state, "model": old}, MODEL)
    with pytest.raises(UserError, match="model.layer_norm_eps is 1e-06 in the checkpoint, 1e-05 in the config"):
        check_same_model({**state, "model": old}, MODEL.model_copy(update={"layer_norm_eps": 1e-5}))


def test_how_routers_compute_is_part_of_the_model(state) -> None:
    with pytest.raises(UserError, match="model.mlp.router.renormalize is true in the checkpoint, false in the config"):
        check_same_model(state, MODEL.model_copy(update={"router": RouterConfig(renormalize=False)}))


def test_another_model_is_refused_with_each_key_and_both_values(state) -> None:
    attention = MixtureOfAttentionConfig(num_kv_heads=1, head_dim=4, num_experts=2, top_k=1)
    other = MODEL.model_copy(update={"hidden_size": 8, "attention": attention})
    with pytest.raises(UserError) as caught:
        check_same_model(state, other)
    text = str(caught.value)
    assert "model.hidden_size is 4 in the checkpoint, 8 in the config" in text
    assert "model.attention.head_dim is 2 in the checkpoint, 4 in the config" in text
    assert "ffn_hidden_size" not in text and "\n" not in text and caught.value.exit_code == 2


def test_a_gated_model_is_another_but_for_the_coefficient_of_its_loss(state) -> None:
    gated = MODEL.model_copy(update={"depth": DepthConfig(every=1)})
    with pytest.raises(UserError, match="model.depth.every is null in the checkpoint, 1 in the config"):
        check_same_model(state, gated)
    theirs = {**state, "model": gated.model_dump(mode="json")}
    check_same_model(theirs, MODEL.model_copy(update={"depth": DepthConfig(every=1, coef=0.5)}))
    with pytest.raises(UserError, match="model.depth.threshold is 0.5 in the checkpoint, 0.4 in the config"):
        check_same_model(theirs, MODEL.model_copy(update={"depth": DepthConfig(every=1, threshold=0.4)}))


def test_none_goes_on_with_weights_alone(run) -> None:
    with pytest.raises(UserError, match="weights alone: .*checkpoint.initialize_from"):
        load_checkpoint(run / "checkpoints" / "iter_0000300", [], object())


def test_random_states_survive_json() -> None:
    stored = json.loads(json.dumps(random_state()))
    expected = [random.random(), random.gauss(0, 1), torch.rand(3).tolist()]
    restore_random_state(stored)
    assert [random.random(), random.gauss(0, 1), torch.rand(3).tolist()] == expected
    restore_random_state(None)  # a checkpoint without
