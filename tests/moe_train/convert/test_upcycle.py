"""A mixture out of a dense model: it computes the same, in little memory, and what does not fit is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from moe_train.checkpoint.weights import Entry, WeightsReader, write_entries, write_weights
from moe_train.convert.upcycle import read_router_keys, upcycle
from moe_train.errors import UserError
from moe_train.model.config import (
    DenseMLPConfig,
    GroupedQueryAttentionConfig,
    MixtureOfAttentionConfig,
    MixtureOfMLPConfig,
)
from moe_train.model.router_config import RouterConfig
from tests.small_checkpoint import random_weights, small_config, write_checkpoint

DENSE = small_config(
    norm_eps=1e-5,
    layer_norm_eps=1e-5,
    attention=GroupedQueryAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=DenseMLPConfig(ffn_hidden_size=20),
)
IDS = np.random.default_rng(0).integers(0, DENSE.vocab_size, (3, 17))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "checkpoint", DENSE, random_weights(DENSE))


def nll(ranks, checkpoint: Path, layout: list[str] = (), nproc: int = 1) -> np.ndarray:
    return ranks(nproc).run("tests.inference_on_ranks:answer", str(checkpoint), list(layout), IDS, [])[0][0]


@pytest.mark.parametrize(
    ("experts", "top_k", "router"),
    [(4, 2, []), (5, 1, []), (4, 3, ["normalize_logits=true", "logit_scale=2.0", "bias=true"])],
)
def test_it_computes_what_the_dense_model_did(ranks, dense, tmp_path, experts, top_k, router):
    upcycle(dense, tmp_path / "out", experts, top_k, router_std=0.5, router=read_router_keys(router))
    np.testing.assert_allclose(nll(ranks, tmp_path / "out"), nll(ranks, dense), atol=1e-5, rtol=0)
    if experts % 2 == 0:
        two = nll(ranks, tmp_path / "out", ["parallel.expert=2"], nproc=2)
        np.testing.assert_allclose(two, nll(ranks, dense), atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [{}, {"normalize_logits": True, "logit_scale": 2.0, "bias": True}])
@pytest.mark.parametrize("own", [None, RouterConfig(z_coef=0.5, bias=True)])
def test_a_mixture_of_attention_heads_stays_one(ranks, tmp_path, keys, own):
    attention = MixtureOfAttentionConfig(num_kv_heads=2, head_dim=8, num_experts=4, router=own)
    config = DENSE.model_copy(update={"attention": attention, "router": RouterConfig(z_coef=0.25)})
    dense = write_checkpoint(tmp_path / "dense", config, random_weights(config))
    upcycle(dense, tmp_path / "out", 3, 2, router=keys)
    mixture = WeightsReader(tmp_path / "out").config
    assert (mixture.attention, mixture.router) == (config.attention, config.router)
    assert mixture.router_of("mlp") == RouterConfig(z_coef=0.25, **keys)
    np.testing.assert_allclose(nll(ranks, tmp_path / "out"), nll(ranks, dense), atol=1e-5, rtol=0)


def test_from_a_hugging_face_folder(ranks, dense, tmp_path, capsys):
    from moe_train.convert.huggingface import to_hf

    to_hf(dense, tmp_path / "hf")
    upcycle(tmp_path / "hf", tmp_path / "out", 4, 2)
    assert "moe-train plan upcycle" in capsys.readouterr().out
    np.testing.assert_allclose(nll(ranks, tmp_path / "out"), nll(ranks, dense), atol=1e-5, rtol=0)


def test_every_expert_is_a_copy_and_the_router_is_small(dense, tmp_path):
    upcycle(dense, tmp_path / "out", 4, 2, router_std=0.003)
    before, after = WeightsReader(dense), WeightsReader(tmp_path / "out")
    assert after.config.mlp == MixtureOfMLPConfig(ffn_hidden_size=20, num_experts=4, top_k=2, bias=False)
    for name in before.names:
        if ".mlp." not in name:
            assert torch.equal(after.read(name), before.read(name))
        else:
            for expert in after.read(name):
                assert torch.equal(expert.flatten(), before.read(name).flatten())
    router = after.read("layers.0.mlp.router.weight")
    assert 0.002 < router.std() < 0.004
    assert not torch.equal(router, after.read("layers.1.mlp.router.weight"))
    assert after.state["upcycled"]["experts"] == 4


def test_noise_makes_the_copies_differ_by_so_much(dense, tmp_path):
    upcycle(dense, tmp_path / "out", 3, 1, noise=0.1)
    for name in ("layers.0.mlp.gate_up.weight", "layers.1.mlp.down.weight"):
        before, after = WeightsReader(dense).read(name), WeightsReader(tmp_path / "out").read(name)
        differences = after - before.reshape(1, *after.shape[1:])
        assert differences.std() / before.std() == pytest.approx(0.1, rel=0.1)
        assert not torch.equal(differences[0], differences[1])


def test_some_channels_of_each_expert_are_drawn_anew(dense, tmp_path):
    upcycle(dense, tmp_path / "out", 3, 1, reinitialize=0.25)
    before, after = WeightsReader(dense), WeightsReader(tmp_path / "out")
    gate_up, down = (after.read(f"layers.0.mlp.{name}.weight") for name in ("gate_up", "down"))
    changed = (gate_up.view(3, 2, 20, -1) != before.read("layers.0.mlp.gate_up.weight")).all(-1)
    assert changed.sum(-1).tolist() == [[5, 5]] * 3, "not a quarter of the channels, or not of gate and up"
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert torch.equal((down != before.read("layers.0.mlp.down.weight")).all(1), changed[:, 0])
    assert len({tuple(expert.tolist()) for expert in changed[:, 0]}) == 3, "the same channels in each expert"
    again = tmp_path / "again"
    upcycle(dense, again, 3, 1, reinitialize=0.25)
    assert torch.equal(WeightsReader(again).read("layers.0.mlp.down.weight"), down)


def test_the_optimizer_is_kept_where_asked_for(tmp_path):
    weights = random_weights(DENSE)
    kinds = {"weights": torch.bfloat16, "main": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    entries = [
        Entry(f"{kind}.{name}", shape, dtype)
        for kind, dtype in kinds.items()
        for name, shape in DENSE.parameter_shapes().items()
    ]
    values = {"weights": 1.0, "main": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0}
    tensors = ((entry.key, weights[entry.key.split(".", 1)[1]] * values[entry.key.split(".")[0]]) for entry in entries)
    stood = {"step": 7, "samples": 70, "optimizer_steps": 6, "load_balancing_coefs": {"layers.0.attention": 0.004}}
    write_entries(tmp_path / "dense", DENSE, entries, tensors, extra_state=stood)
    upcycle(tmp_path / "dense", tmp_path / "plain", 4, 2)
    assert (
        WeightsReader(tmp_path / "plain").optimizer_kinds == [] and WeightsReader(tmp_path / "plain").state["step"] == 0
    )
    upcycle(tmp_path / "dense", tmp_path / "kept", 4, 2, keep_optimizer=True)
    kept = WeightsReader(tmp_path / "kept")
    assert kept.optimizer_kinds == ["main", "exp_avg", "exp_avg_sq"]
    assert {key: kept.state[key] for key in stood} == stood
    name = "layers.1.mlp.down.weight"
    for kind, dtype in kinds.items():
        read = kept.read_kind(kind, name)
        assert read.dtype == dtype and torch.equal(read[3], (weights[name] * values[kind]).to(dtype))
    router = "layers.1.mlp.router.weight"
    assert not kept.read_kind("exp_avg_sq", router).any()
    assert torch.equal(kept.read_kind("main", router).bfloat16(), kept.read(router))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 2, "top_k": 2}, "--experts 2 --top-k 2: give more experts than a token uses"),
        ({"top_k": 0}, "--top-k 0"),
        ({"noise": -1.0}, "--noise -1"),
        ({"reinitialize": 1.5}, "--reinitialize 1.5: give a part, from 0 to 1"),
        ({"keep_optimizer": True}, "holds weights alone: there is no optimizer state"),
        ({"router": {"capacity_factor": 0.5}}, "mlp.router.capacity_factor: 0.5 has no room for the top_k experts"),
        ({"router": {"renormalise": True}}, "--router: mlp.router.renormalise: unknown key; did you mean"),
        ({"router_std": float("nan")}, "--router-std nan: give 0 or more"),
        ({"router": {"renormalize": False}}, "gates that do not add up to 1"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(dense, tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        upcycle(dense, tmp_path / "out", **{"experts": 4, "top_k": 2, **arguments})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_keys_of_the_router_are_read_as_in_a_run_file():
    assert read_router_keys(["bias=true", "z_coef=1e-3"]) == {"bias": True, "z_coef": 0.001}
    with pytest.raises(DataError, match="--router bias={: is not valid YAML") as caught:
        read_router_keys(["bias={"])
    assert caught.value.exit_code == 2


def test_a_mixture_is_not_upcycled_again(tmp_path):
    config = small_config()
    with pytest.raises(UserError, match="its MLPs are experts already"):
        upcycle(write_checkpoint(tmp_path / "mixture", config, random_weights(config)), tmp_path / "out", 4, 2)
    with pytest.raises(UserError, match="holds no checkpoint"):
        upcycle(tmp_path / "nothing", tmp_path / "out", 4, 2)


LAYERS, HIDDEN, FFN, EXPERTS = 14, 128, 1024, 8


def test_memory_is_near_one_layer(tmp_path):
    """Of a mixture of LAYERS layers; measured in a process of its own, as the growth of its peak."""
    config = DENSE.model_copy(
        update={"hidden_size": HIDDEN, "num_layers": LAYERS, "mlp": DenseMLPConfig(ffn_hidden_size=FFN)}
    )
    tensors = ((name, torch.ones(shape)) for name, shape in config.parameter_shapes().items())
    write_weights(tmp_path / "dense", config, tensors, torch.float32)
    script = f"""
import json, resource, sys
from moe_train.convert.upcycle import upcycle
from moe_train.checkpoint.weights import WeightsReader
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
upcycle(sys.argv[1], sys.argv[2] + "/warm", 2, 1)
before = peak()
upcycle(sys.argv[1], sys.argv[2] + "/out", {EXPERTS}, 2)
print(json.dumps(peak() - before))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "dense"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    layer = 4 * EXPERTS * 3 * HIDDEN * FFN
    assert json.loads(done.stdout.splitlines()[-1]) < 2 * layer < LAYERS * layer / 6


def test_more_experts_than_memory_are_one_line(dense, tmp_path):
    with pytest.raises(UserError, match="--experts 100000000000000: .* memory"):
        upcycle(dense, tmp_path / "out", 10**14, 2)
    assert not any(tmp_path.iterdir())
