"""Dense MLPs, grouped-query attention and their mixtures: one curve, and one checkpoint, on every layout."""

from __future__ import annotations

import pytest
import yaml

from tests.integration import runs
from tests.integration.test_layouts import assert_same_curve
from tests.small_models import SMALL, changes

MODELS = {name: changes(make()) for name, make in SMALL.items()}
TENSOR, PIPELINE, EXPERT = {"tensor": 2}, {"pipeline": 2}, {"expert": 2}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
BOTH = {"tensor": 2, "expert": 2}
CURVES = [
    ("llama", {}, {}),
    ("llama", TENSOR, {}),
    ("llama", VIRTUAL, {}),
    ("llama", TENSOR, {"recompute": "selective"}),
    ("llama", TENSOR, {"document_end": 7}),
    ("mixtral", EXPERT, {}),
    ("mixtral", BOTH, {"recompute": "selective"}),
    ("olmoe", TENSOR, {}),
    ("olmoe", PIPELINE, {}),
    ("olmoe", BOTH, {"recompute": "full"}),
    ("skywork", BOTH, {}),
]


@pytest.fixture(scope="module")
def one_rank(ranks):
    """``one_rank(model, options)``: its curve, computed once."""
    curves = {}

    def curve(model: str, options: dict) -> list[dict]:
        options = {key: value for key, value in options.items() if key != "recompute"}
        key = (model, *options.items())
        if key not in curves:
            curves[key] = ranks(1).run("tests.steps_on_ranks:train", {}, steps=6, model=MODELS[model], **options)[0]
        return curves[key]

    return curve


@pytest.mark.parametrize("model, layout, options", CURVES, ids=str)
def test_the_curve_does_not_depend_on_the_layout(ranks, one_rank, model, layout, options):
    curves = ranks(2).run("tests.steps_on_ranks:train", layout, steps=6, model=MODELS[model], **options)
    reference = one_rank(model, options)
    assert_same_curve(curves[0], reference, f"{model} {layout}")
    assert reference[-1]["loss"] < reference[0]["loss"] + 0.1
    assert all(curve[-1]["loss"] == curves[0][-1]["loss"] for curve in curves), "ranks disagree"


def test_a_model_without_routers_has_no_router_losses(one_rank):
    for step in one_rank("llama", {}):
        assert step["balance"] == step["z"] == 0 and step["counts"] == {}


@pytest.mark.parametrize(
    "model, origin, layouts",
    [("llama", TENSOR, [TENSOR, PIPELINE]), ("olmoe", BOTH, [BOTH, TENSOR, PIPELINE])],
    ids=["llama", "olmoe"],
)
def test_a_checkpoint_resumes_on_another_layout(ranks, tmp_path, model, origin, layouts):
    steps, more = 2, 2
    values = {"model": MODELS[model]}
    uninterrupted = ranks(2).run("tests.steps_on_ranks:save", origin, str(tmp_path), steps, more, **values)[0]
    checkpoint = str(tmp_path / f"iter_{steps:07d}")
    for layout in layouts:
        (resumed,) = ranks(2).run("tests.steps_on_ranks:resume", layout, [checkpoint], steps, more, **values)[0]
        if layout is origin:
            assert resumed == uninterrupted, "not bit for bit"
        assert_same_curve(resumed, uninterrupted, f"{origin} -> {layout}")


def test_bf16_stays_near_itself(ranks):
    values = {"steps": 4, "precision": "bf16", "model": MODELS["olmoe"]}
    reference = ranks(1).run("tests.steps_on_ranks:train", {}, **values)[0]
    curve = ranks(2).run("tests.steps_on_ranks:train", TENSOR, **values)[0]
    for step, expected in zip(curve, reference):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-2)


def test_a_dense_model_is_trained_and_resumed_by_command(tmp_path):
    runs.write_corpora(tmp_path)
    model = yaml.safe_load((tmp_path / "model.yaml").read_text())
    model["attention"] = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    model["mlp"] = {"kind": "dense", "ffn_hidden_size": 40}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model, sort_keys=False))
    status, said = runs.run(tmp_path)
    assert status == 2 and "parallel.expert 2 has no experts of this model to share out" in said
    status, said = runs.run(tmp_path, "parallel.expert=1", "parallel.tensor=2", "training.max_steps=8")
    assert status == 0, said
    status, said = runs.run(tmp_path, "parallel.expert=1", "parallel.pipeline=2", "training.max_steps=12")
    assert status == 0 and "resumed from" in said, said
    lines = runs.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {line["load_balancing_loss"] for line in lines} == {0.0}
