"""Transformer Engine's layers: chosen, built as for an H100, and trained with on the CPU.

Where it is installed (Python 3.12, a torch with CUDA): elsewhere the choice alone is tested.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from moe_train.config import load_model
from moe_train.model.depth_config import DepthConfig
from parallel.errors import EngineError
from parallel.transformer_engine import RECIPES, choose_kernels, row_multiple

installed = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed (extra [gpu])"
)
ON_CPU = "tests.transformer_engine_on_cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_torch_and_what_needs_one_is_refused():

    assert choose_kernels(None, None) == choose_kernels("torch", None) == "torch"
    with pytest.raises(EngineError, match="kernels: transformer_engine needs a GPU"):
        choose_kernels("transformer_engine", None)
    with pytest.raises(EngineError, match="precision: fp8 needs a GPU"):
        choose_kernels(None, "tensorwise")


def test_on_a_gpu_it_is_what_is_installed(monkeypatch):
    from parallel import transformer_engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version, kernels in ((None, "torch"), ("2.8.1", "torch"), ("2.20.2", "transformer_engine")):
        monkeypatch.setattr(transformer_engine, "find_transformer_engine", lambda version=version: version)
        assert choose_kernels(None, None) == kernels
        assert choose_kernels("torch", None) == "torch"
    monkeypatch.setattr(transformer_engine, "find_transformer_engine", lambda: None)
    with pytest.raises(EngineError, match=r"fp8 needs Transformer Engine, which is not installed: pip install"):
        choose_kernels(None, "delayed")
    monkeypatch.setattr(transformer_engine, "find_transformer_engine", lambda: "2.8.1")
    with pytest.raises(EngineError, match="2.9 or later, and 2.8.1 is installed"):
        choose_kernels("transformer_engine", None)
    with pytest.raises(EngineError, match="leave training.kernels out"):
        choose_kernels("torch", "delayed")


def test_fp8_that_megatron_core_would_leave_out_in_silence_is_an_error(monkeypatch):
    """Without Transformer Engine its FP8 context does nothing."""
    from megatron.core import fp8_utils

    from parallel.transformer_engine import precision_context

    engine = SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise")
    with monkeypatch.context() as patch:
        if importlib.util.find_spec("transformer_engine"):
            patch.setattr(fp8_utils, "get_fp8_context", lambda config: nullcontext())
        with pytest.raises(EngineError, match="does not see Transformer Engine"):
            precision_context(engine)
    assert isinstance(precision_context(SimpleNamespace(fp8=None)), nullcontext)


@installed
def test_the_device_decides_on_the_recipe(gpu_ranks):
    refusals = {name: gpu_ranks(1).run("tests.gpu.on_a_side:why_not", name)[0] for name in (None, *RECIPES)}
    assert "mxfp8 is not for NVIDIA H100" in refusals["mxfp8"]
    assert "set delayed or tensorwise or blockwise" in refusals.pop("mxfp8")
    assert not any(refusals.values()), refusals
    assert {recipe: row_multiple(recipe) for recipe in (None, *RECIPES)} == {
        None: 1,
        "delayed": 16,
        "tensorwise": 16,
        "blockwise": 16,
        "mxfp8": 32,
    }


@installed
@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("preset", ["jetmoe_8b", "olmoe_1b_7b", "skywork_dense_13b"])
def test_models_are_built_for_an_h100(gpu_ranks, preset, recipe):
    """Every parameter placed, none twice, none missing."""
    (built,) = gpu_ranks(1).run(f"{ON_CPU}:built", preset, recipe)
    config = load_model(preset)
    assert built["parameters"] == config.num_parameters()
    assert built["names"] == set(config.parameter_shapes())
    assert {"TEColumnParallelLinear", "TEDotProductAttention", "RMSNorm"} <= built["modules"]
    assert ("TERowParallelLinear" if preset == "skywork_dense_13b" else "TEGroupedLinear") in built["modules"]


@installed
@pytest.mark.parametrize(
    "layout, options",
    [
        ({}, {}),
        ({}, {"recompute": "selective"}),
        ({"tensor": 2}, {}),
        ({"tensor": 2, "expert": 2}, {"recompute": "full"}),
        ({"expert": 2}, {"sharded_attention": False}),
        ({"pipeline": 2}, {}),
    ],
)
def test_the_curve_is_that_of_torchs_kernels(ranks, gpu_ranks, layout, options):
    world_size = 2 if layout else 1
    expected = ranks(1).run(f"{ON_CPU}:train", {}, kernels="torch")[0]
    for step, wanted in zip(gpu_ranks(world_size).run(f"{ON_CPU}:train", layout, **options)[0], expected):
        for figure in ("loss", "balance", "z", "norm"):
            assert step[figure] == pytest.approx(wanted[figure], rel=1e-4), figure


@installed
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"recompute": "selective"}])
def test_micro_batches_that_take_turns_are_all_counted(gpu_ranks, options):
    """The backward of the last comes first: no gradient may take the place of what is there."""
    apart, in_turn = (
        gpu_ranks(2).run(f"{ON_CPU}:train", {"tensor": 2, "expert": 2}, in_turn=n, **options)[0] for n in (1, 2)
    )
    near = 3e-2 if "precision" in options else 1e-4
    for step, wanted in zip(in_turn, apart):
        assert step["loss"] == pytest.approx(wanted["loss"], rel=near / 10)
        assert step["norm"] == pytest.approx(wanted["norm"], rel=near)


@installed
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_stays_near_bf16(ranks, gpu_ranks, recipe):
    expected = ranks(1).run(f"{ON_CPU}:train", {}, kernels="torch", precision="bf16")[0]
    curve = gpu_ranks(1).run(f"{ON_CPU}:train", {}, recipe=recipe)[0]
    again = gpu_ranks(1).run(f"{ON_CPU}:train", {}, recipe=recipe, recompute="full")[0]
    across = gpu_ranks(2).run(f"{ON_CPU}:train", {"tensor": 2, "expert": 2}, recipe=recipe)[0]
    for step, wanted, same, other in zip(curve, expected, again, across):
        assert step["loss"] == pytest.approx(wanted["loss"], rel=1e-2) and step["loss"] != wanted["loss"]
        assert (step["loss"], step["norm"]) == (same["loss"], same["norm"]), "recomputation changes it"
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-2)


@installed
def test_some_tokens_pass_layers_by(ranks, gpu_ranks):
    """Whatever number of them goes through: it is filled up to what FP8 products take."""
    options = {"depth": DepthConfig(initial_gate=0.5)}
    expected = ranks(1).run(f"{ON_CPU}:train", {}, kernels="torch", **options)[0]
    across = gpu_ranks(2).run(f"{ON_CPU}:train", {"tensor": 2, "expert": 2}, **options)[0]
    in_fp8 = gpu_ranks(2).run(f"{ON_CPU}:train", {"tensor": 2, "expert": 2}, recipe="tensorwise", **options)[0]
    for step, wanted, rounded in zip(across, expected, in_fp8):
        assert 0.1 < wanted["depths"]["layers.1"]["through"] < 0.9
        assert step["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert rounded["loss"] == pytest.approx(wanted["loss"], rel=1e-2) and rounded["loss"] != wanted["loss"]


@installed
def test_every_product_of_a_layer_runs_in_fp8(gpu_ranks):
    ours, of_torch = (gpu_ranks(1).run(f"{ON_CPU}:products", recipe)[0] for recipe in ("tensorwise", None))
    layers, micro_batches = 4, 2
    assert ours == [layers * micro_batches * 3 * (4 + 1)] * 2, (
        "4 grouped ones and that of keys and values, three times each"
    )
    assert of_torch == [0, ours[1]]


@installed
def test_the_planner_knows_what_fp8_weights_take(gpu_ranks):
    held, planned = gpu_ranks(1).run(f"{ON_CPU}:bytes_of_fp8_weights")[0]
    assert held == planned > 0


@installed
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_resume_in_fp8_is_bit_for_bit(gpu_ranks, tmp_path, recipe):
    """The scales that delayed scaling remembers are in the checkpoint, and go to other layouts with it."""
    more = gpu_ranks(2).run(f"{ON_CPU}:save", {"expert": 2}, str(tmp_path), 3, 2, recipe=recipe)[0]
    checkpoint = str(tmp_path / "iter_0000003")
    same = gpu_ranks(2).run(f"{ON_CPU}:resume", {"expert": 2}, checkpoint, 3, 2, recipe=recipe)[0]
    assert [step["loss"] for step in same] == [step["loss"] for step in more]
    for layout, world_size in (({}, 1), ({"tensor": 2}, 2), ({"pipeline": 2}, 2)):
        other = gpu_ranks(world_size).run(f"{ON_CPU}:resume", layout, checkpoint, 3, 2, recipe=recipe)[0]
        for step, wanted in zip(other, more):
            assert step["loss"] == pytest.approx(wanted["loss"], rel=5e-3)
