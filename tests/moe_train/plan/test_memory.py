"""Memory against what the engine really allocates, on any layout."""

from __future__ import annotations

import json

import pytest

from moe_train.cli import main
from moe_train.model.depth_config import DepthConfig
from moe_train.plan import activations, memory, shards
from tests.memory_on_ranks import wide_model
from tests.steps_on_ranks import make_layout, small_model

LAYOUTS = [
    (2, {}),
    (2, {"tensor": 2}),
    (2, {"expert": 2}),
    (2, {"tensor": 2, "expert": 2}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
]


def name(value) -> str:
    return "-".join(f"{key}{size}" for key, size in value.items()) or "data" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("nproc", "layout"), LAYOUTS, ids=name)
def test_state_is_exact(ranks, nproc: int, layout: dict, precision: str, tied: bool) -> None:
    replicated = layout.get("expert", 1) > 1 and tied
    model = {"tie_embeddings": tied}
    measured = ranks(nproc).run("tests.memory_on_ranks:state_bytes", layout, model, precision, not replicated)
    shape = make_layout(nproc, **layout)
    for rank, found in enumerate(measured):
        planned = memory.state_bytes(
            small_model(**model),
            shape,
            shards.place(shape, rank),
            precision,
            sharded_attention=not replicated,
        )
        assert planned == found, f"rank {rank}"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("nproc", "layout"), LAYOUTS, ids=name)
def test_activations_within_15_percent(ranks, nproc: int, layout: dict, recompute: str) -> None:
    measured = ranks(nproc).run("tests.memory_on_ranks:activation_bytes", layout, {}, recompute, 64)
    shape = make_layout(nproc, **layout)
    work = activations.Workload(wide_model(), shape, 64, 2, 4)
    for rank, found in enumerate(measured):
        planned = activations.stage_bytes(work, shards.place(shape, rank).stage, 2, recompute)
        assert planned == pytest.approx(found, rel=0.15), f"rank {rank}"


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}])
def test_of_gated_layers_those_are_counted_that_take_every_token(ranks, layout) -> None:
    model, shape = {"depth": DepthConfig(threshold=1e-6)}, make_layout(2, **layout)
    plain, planned = (
        activations.stage_bytes(activations.Workload(each, shape, 64, 2, 4), 0, 2)
        for each in (wide_model(), wide_model(**model))
    )
    measured = ranks(2).run("tests.memory_on_ranks:activation_bytes", layout, model, "none", 64)
    print(measured, planned, plain)
    assert max(measured) == pytest.approx(planned, rel=0.1) and planned > 1.05 * plain


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=name)
def test_a_document_mask_is_kept_once_for_all_layers(ranks, layout: dict, recompute: str) -> None:
    length, shape = 512, make_layout(2, **layout)
    measured = ranks(2).run("tests.memory_on_ranks:activation_bytes", layout, {}, recompute, length, document_end=7)
    work = activations.Workload(wide_model(), shape, length, 2, 4, document_mask=True)
    assert activations.mask_bytes(work) == 2 * 2 * length**2 * 4
    for rank, found in enumerate(measured):
        planned = activations.stage_bytes(work, shards.place(shape, rank).stage, 2, recompute)
        assert planned == pytest.approx(found, rel=0.05), f"rank {rank}"


def test_gated_layers_keep_masks_of_their_own(ranks) -> None:
    model, shape = {"depth": DepthConfig(threshold=1e-6)}, make_layout(1)
    (measured,) = ranks(1).run("tests.memory_on_ranks:activation_bytes", {}, model, "none", 512, document_end=7)
    work = activations.Workload(wide_model(**model), shape, 512, 2, 4, document_mask=True)
    assert activations.stage_bytes(work, 0, 2) == pytest.approx(measured, rel=0.05)
    assert 3 * activations.mask_bytes(work) > 0.2 * measured


def test_what_is_computed_again_of_a_layer_may_be_gated() -> None:
    shape = make_layout(1)
    plain, gated = (
        activations.stage_bytes(activations.Workload(model, shape, 64, 2, 4), 0, 2, "full")
        for model in (wide_model(), wide_model(depth=DepthConfig()))
    )
    assert gated - plain > 3 * 2 * 64 * wide_model().hidden_size * 4


def test_micro_batches_that_take_turns_are_both_kept(ranks) -> None:
    measured = ranks(2).run("tests.memory_on_ranks:activation_bytes", {"expert": 2}, {}, "selective", 64, 2)
    shape = make_layout(2, expert=2)
    work = activations.Workload(wide_model(), shape, 64, 2, 4, in_turn=2)
    assert work.count(8) == 1
    for found in measured:
        assert activations.stage_bytes(work, 0, 1, "selective") == pytest.approx(found, rel=0.15)


def test_the_head_s_chunks_are_the_model_s() -> None:
    from moe_train.model import head

    assert activations.LOGITS_PER_CHUNK == head.LOGITS_PER_CHUNK
    work = activations.Workload(wide_model(vocab_size=2**17), make_layout(1), 2048, 1, 2)
    assert activations.logits_bytes(work, "cpu") == 64 * 2**17 * 8
    assert activations.logits_bytes(work, "cuda") == 1024 * 2**17 * 4


def test_worst_case_routing_is_what_a_rank_may_receive() -> None:
    shape = make_layout(4, expert=4)
    work = activations.Workload(wide_model(), shape, 64, 2, 4)
    assert work.rows("mlp") == 2 * 128
    assert work.rows("mlp", worst=True) == 4 * 128  # one expert a rank: each token of four ranks, once
    alone = activations.Workload(wide_model(), make_layout(4), 64, 2, 4)
    assert alone.rows("mlp", worst=True) == alone.rows("mlp")


@pytest.mark.parametrize(
    ("layout", "flying"),
    [({"pipeline": 4}, [4, 3, 2, 1]), ({"pipeline": 4, "virtual_pipeline": 2}, [11, 9, 7, 5]), ({}, [1] * 4)],
    ids=name,
)
def test_chunks_in_flight(layout: dict, flying: list[int]) -> None:
    shape = make_layout(4, **layout)
    stages = [shards.place(shape, rank).stage for rank in range(4)]
    assert [activations.chunks_in_flight(shape, stage, 8) for stage in stages] == flying
    assert max(activations.chunks_in_flight(shape, stage, 1) for stage in stages) <= (shape.virtual_pipeline or 1)


def ask(capsys, *arguments: str) -> dict:
    assert main(["plan", "memory", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_jetmoe_8b_on_twelve_nodes(capsys, monkeypatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    answer = ask(capsys, "jetmoe_8b", "--nodes", "12")
    assert answer["world_size"] == 96 and len(answer["ranks"]) == 96 and answer["fits_worst_case"]
    # One replica of the model is the 24 ranks that share a pipeline; the tied embedding is on two stages.
    replica = [row for row in answer["ranks"] if row["rank"] % 24 == 0]
    assert sum(row["gradients"] for row in replica) == pytest.approx(4 * (8_522_237_952 + 32000 * 2048), rel=1e-3)
    states = sum(row["optimizer"] for row in answer["ranks"])
    assert states == 12 * (8_522_237_952 + 32000 * 2048)


def test_what_does_not_fit_is_said(capsys) -> None:
    assert main(["plan", "memory", "jetmoe_8b", "--nproc", "2", "parallel.pipeline=1"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_recomputing_takes_less(capsys) -> None:
    sizes = [
        ask(capsys, "jetmoe_8b", f"training.recompute={kind}")["ranks"][0]["activations"]
        for kind in ("none", "selective", "full")
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0] / 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--nodes", "1", "--nproc", "2"], "give --nodes or --nproc"),
        (["demo", "--nproc", "3", "--gpu", "none"], "the nearest that would do"),
        (["demo", "--gpu", "abacus"], "abacus"),
        (["demo", "--nproc", "2", "training.recompute=some"], "training.recompute"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], expected: str, capsys) -> None:
    assert main(["plan", "memory", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
