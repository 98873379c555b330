"""One model, one stream, many layouts: the same curve."""

from __future__ import annotations

import pytest

LAYOUTS = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2, virtual 2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "expert 2": (2, {"expert": 2}),
    "tensor 2, expert 2": (2, {"tensor": 2, "expert": 2}),
    "pipeline 2, expert 2": (4, {"pipeline": 2, "expert": 2}),
    "tensor 2, pipeline 2, virtual 2, expert 2": (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    "tensor 2, expert 4": (4, {"tensor": 2, "expert": 4}),
}


@pytest.fixture(scope="module")
def one_rank(ranks):
    return ranks(1).run("tests.steps_on_ranks:train", {})[0]


def flips(ours: list[dict], theirs: list[dict]) -> int:
    """A lower bound of the (token, slot) pairs that went to another expert, over all steps and routers."""
    return sum(
        sum(abs(a - b) for a, b in zip(left["counts"][name], right["counts"][name])) // 2
        for left, right in zip(ours, theirs)
        for name in left["counts"]
    )


def assert_same_curve(curve: list[dict], reference: list[dict], name: str) -> None:
    print(f"{name}: {flips(curve, reference)} pairs flipped over {len(curve)} steps")
    for number, (step, expected) in enumerate(zip(curve, reference), start=1):
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-5 if number <= 3 else 1e-4), (name, number)
        for figure in ("balance", "z", "norm"):
            assert step[figure] == pytest.approx(expected[figure], rel=1e-3), (name, number, figure)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_does_not_depend_on_the_layout(ranks, one_rank, name):
    world_size, layout = LAYOUTS[name]
    curves = ranks(world_size).run("tests.steps_on_ranks:train", layout)
    assert_same_curve(curves[0], one_rank, name)
    assert all(curve[-1]["loss"] == curves[0][-1]["loss"] for curve in curves), "ranks disagree"


@pytest.mark.parametrize(
    "layout, options",
    [
        ({}, {}),
        ({"tensor": 2, "expert": 2}, {"recompute": "selective"}),
        ({"pipeline": 2, "virtual_pipeline": 2}, {}),
        ({"tensor": 2, "expert": 2}, {"in_turn": 2}),
        ({"expert": 2}, {"dispatcher": "allgather", "offload": "torch"}),
    ],
    ids=["alone", "tensor 2 x expert 2", "pipeline 2, virtual 2", "overlap_dispatch", "allgather, offload"],
)
def test_nor_on_the_device(gpu_ranks, one_rank, layout, options):
    """With all that a run on GPUs does otherwise, its communication beside the backward for one."""
    options = {"overlap": True, "steps": 4, **options}
    curve = gpu_ranks(2 if layout else 1).run("tests.steps_on_ranks:train", layout, **options)[0]
    assert_same_curve(curve, one_rank[:4], str(layout))


@pytest.mark.parametrize(
    "world_size, layout, options",
    [
        (2, {"expert": 2}, {"recompute": "selective"}),
        (2, {"tensor": 2, "expert": 2}, {"recompute": "full"}),
        (2, {"expert": 2}, {"sharded_attention": False}),
        (2, {"tensor": 2, "expert": 2}, {"sharded_attention": False}),
        (2, {"pipeline": 2}, {"model": {"tie_embeddings": False}}),
        (2, {"tensor": 2}, {"model": {"tie_embeddings": False, "vocab_size": 3}}),
    ],
)
def test_nor_on_recomputation_or_where_attention_experts_live(ranks, world_size, layout, options):
    model = {"model": options["model"]} if "model" in options else {}
    reference = ranks(1).run("tests.steps_on_ranks:train", {}, steps=4, **model)[0]
    curve = ranks(world_size).run("tests.steps_on_ranks:train", layout, steps=4, **options)[0]
    assert_same_curve(curve, reference, f"{layout} {options}")


ROUTERS = {
    "skywork, dropped by position": ({"load_balancing": "skywork", "drop_by": "position"}, {}),
    "switch, dropped by probability": ({"drop_by": "probability", "scope": "sequence"}, {}),
    "one of each": ({"load_balancing": "none", "normalize_logits": False}, {"load_balancing": "skywork", "bias": True}),
}


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}])
@pytest.mark.parametrize("name", ROUTERS)
def test_nor_does_what_the_routers_do(ranks, name, layout):
    """Normalised logits, either loss, a capacity that drops or only counts, a coefficient that adapts to it."""
    from moe_train.model.config import MixtureOfMLPConfig, RouterConfig

    common = {"load_balancing_coef": 0.5, "normalize_logits": True, "capacity_factor": 1.0}
    adaptive = {"adaptive": {"xi": 1.0, "max_coef": 0.2, "beta": 0.7}}
    router, of_mlp = ROUTERS[name]
    mlp = RouterConfig.model_validate({**common, **adaptive, **router, **of_mlp})
    router = RouterConfig.model_validate(
        {**common, **({} if router.get("load_balancing") == "none" else adaptive), **router}
    )
    model = {
        "router": router,
        "mlp": MixtureOfMLPConfig(ffn_hidden_size=24, num_experts=4, top_k=2, router=mlp if of_mlp else None),
    }
    expected = ranks(1).run("tests.steps_on_ranks:train", {}, steps=4, model=model)[0]
    recompute = "full" if len(layout) == 2 else "none"
    options = {"recompute": recompute, "dispatcher": "allgather" if layout == {"expert": 2} else "alltoall"}
    curves = ranks(2).run("tests.steps_on_ranks:train", layout, steps=4, model=model, **options)
    assert_same_curve(curves[0], expected, f"{layout} {name}")
    last, wanted = curves[0][-1], expected[-1]
    assert (
        last["drop_rates"] == pytest.approx(wanted["drop_rates"], abs=0.02)
        and max(wanted["drop_rates"].values()) > 0.05
    )
    assert len(last["coefficients"]) == (4 if name == "one of each" else 8)
    assert last["coefficients"] == pytest.approx(wanted["coefficients"], rel=2e-2)
    assert max(last["coefficients"].values()) < 0.3, "the coefficients did not adapt"
    assert all(curve[-1]["coefficients"] == last["coefficients"] for curve in curves), "ranks disagree"
    for name, figures in wanted["routers"].items():
        assert last["routers"][name]["max1_over_max2"] == pytest.approx(figures["max1_over_max2"], rel=1e-3)


@pytest.mark.parametrize(
    "world_size, layout, options",
    [
        (2, {"expert": 2}, {"row_multiple": 4}),
        (2, {"tensor": 2, "expert": 2}, {"recompute": "full"}),
        (4, {"pipeline": 2, "expert": 2}, {}),
    ],
)
def test_nor_on_the_dispatcher(ranks, one_rank, world_size, layout, options):
    curve = ranks(world_size).run("tests.steps_on_ranks:train", layout, steps=4, dispatcher="allgather", **options)[0]
    assert_same_curve(curve, one_rank[:4], f"{layout} all-gather")


@pytest.mark.parametrize(
    "world_size, layout, options",
    [
        (2, {"expert": 2}, {"row_multiple": 16}),
        (2, {"tensor": 2, "expert": 2}, {"recompute": "full"}),
        (2, {"expert": 2}, {"sharded_attention": False, "recompute": "selective"}),
        (4, {"tensor": 2, "expert": 4}, {"model": {"router": {"capacity_factor": 1.0, "drop_by": "position"}}}),
        (4, {"pipeline": 2, "expert": 2}, {}),
    ],
)
def test_deep_ep_changes_no_bit_of_the_all_to_all(ranks, world_size, layout, options):
    from moe_train.model.config import RouterConfig

    options = {"precision": "bf16", **options}
    if "model" in options:
        options["model"] = {"router": RouterConfig(load_balancing_coef=0.02, **options["model"]["router"])}
    expected = ranks(world_size).run("tests.steps_on_ranks:train", layout, steps=4, **options)
    assert ranks(world_size).run("tests.steps_on_ranks:train_by_deep_ep", layout, steps=4, **options) == expected


TAKING_TURNS = [
    (2, {"expert": 2}, {"overlap": True}),
    (2, {"expert": 2}, {"recompute": "selective", "row_multiple": 4, "document_end": 7}),
    (2, {"tensor": 2, "expert": 2}, {"model": {"router": {"capacity_factor": 1.0, "drop_by": "position"}}}),
    (4, {"pipeline": 2, "expert": 2}, {"sharded_attention": False}),
    (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}, {}),
]


@pytest.mark.parametrize("world_size, layout, options", TAKING_TURNS)
def test_micro_batches_that_take_turns_are_the_same_ones(ranks, world_size, layout, options):
    """Every figure, those of each router included; only the order in which gradients are summed is another."""
    from moe_train.model.config import RouterConfig

    if "model" in options:
        options = {**options, "model": {"router": RouterConfig(load_balancing_coef=0.02, **options["model"]["router"])}}
    options = {"steps": 4, "micro_batch": 1, **options}
    expected = ranks(world_size).run("tests.steps_on_ranks:train", layout, **options)[0]
    curve = ranks(world_size).run("tests.steps_on_ranks:train", layout, in_turn=2, **options)[0]
    assert_same_curve(curve, expected, f"{layout} {options}")
    assert flips(curve, expected) == 0
    assert curve[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert curve[0]["norm"] == pytest.approx(expected[0]["norm"], rel=1e-6)


@pytest.mark.parametrize("layout", [{"expert": 2}, {"tensor": 2, "expert": 2}])
def test_one_computes_while_the_rows_of_the_other_travel(ranks, layout):
    """In both directions, but for the last exchange of the forward and the first of the backward: nobody is left."""
    per_step = 2 * 4 * 6 * 2  # micro-batches, layers, exchanges of a layer, directions
    for products in ranks(2).run("tests.steps_on_ranks:travels_of_a_step", layout, in_turn=1):
        assert products == [0] * per_step
    for products in ranks(2).run("tests.steps_on_ranks:travels_of_a_step", layout, in_turn=2):
        assert len(products) == per_step and products.count(0) == 2


def test_nor_where_the_rows_of_experts_are_filled_up(ranks, one_rank):
    curve = ranks(2).run("tests.steps_on_ranks:train", {"tensor": 2, "expert": 2}, steps=4, row_multiple=16)[0]
    assert_same_curve(curve, one_rank[:4], "rows in multiples of 16")


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}])
def test_nor_where_documents_are_kept_apart(ranks, layout):
    whole, apart = (ranks(1).run("tests.steps_on_ranks:train", {}, steps=4, document_end=end)[0] for end in (None, 7))
    assert abs(whole[0]["loss"] - apart[0]["loss"]) > 1e-4 * whole[0]["loss"]
    curve = ranks(2).run("tests.steps_on_ranks:train", layout, steps=4, document_end=7)[0]
    assert_same_curve(curve, apart, f"{layout} documents apart")


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"expert": 2}])
def test_bf16_stays_near_itself_on_every_layout(ranks, layout):
    reference = ranks(1).run("tests.steps_on_ranks:train", {}, steps=4, precision="bf16")[0]
    curve = ranks(2).run("tests.steps_on_ranks:train", layout, steps=4, precision="bf16")[0]
    for step, expected in zip(curve, reference):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-2)


def test_router_losses_depend_on_the_micro_batch_unless_their_scope_is_a_sequence(ranks):
    from moe_train.model.config import RouterConfig

    figures = {}
    for scope in ("micro_batch", "sequence"):
        router = {"router": RouterConfig(scope=scope, load_balancing_coef=0.5)}
        for size in (1, 4):
            run = ranks(2).run("tests.steps_on_ranks:train", {"tensor": 2}, steps=3, model=router, micro_batch=size)
            figures[scope, size] = run[0]
    for by_one, by_four in zip(figures["sequence", 1], figures["sequence", 4]):
        assert by_one["loss"] == pytest.approx(by_four["loss"], rel=2e-5)
        assert by_one["balance"] == pytest.approx(by_four["balance"], rel=1e-4)
    assert abs(figures["micro_batch", 1][0]["balance"] - figures["micro_batch", 4][0]["balance"]) > 1e-3
