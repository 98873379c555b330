"""`moe-train plan layout`: every legal layout, its volumes by hand, and calibration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.plan import memory, shards
from moe_train.plan.activations import Workload, dispatch_bytes
from moe_train.plan.hardware import load_hardware
from moe_train.plan.layouts import candidates, evaluate
from moe_train.plan.run_file import load_plan
from moe_train.plan.step_time import exchanged_bytes, forward_flops, reduced_bytes
from tests.steps_on_ranks import make_layout, small_model


def ask(capsys, *arguments: str) -> dict:
    assert main(["plan", "layout", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_best_layouts_fit_and_come_fastest_first(capsys) -> None:
    answer = ask(capsys, "jetmoe_8b", "--nodes", "12", "--gpu", "h100")
    best = answer["best"]
    assert len(best) == 10 and answer["legal"] >= answer["fitting"] >= 10
    assert [row["step_seconds"] for row in best] == sorted(row["step_seconds"] for row in best)
    usable = load_hardware("h100").usable_bytes
    for row in best:
        assert row["bytes"] <= usable and 0 < row["mfu"] < answer["compute_efficiency"]["value"]
        assert (row["bubble"] == 0) == (row["pipeline"] == 1) and row["tensor"] * row["pipeline"] * row["data"] == 96
        assert row["seconds"]["compute"] < row["step_seconds"]


def test_the_patch_is_a_legal_run(capsys) -> None:
    for row in ask(capsys, "jetmoe_8b", "--nodes", "4", "training.global_batch_size=1024")["best"]:
        changes = [
            f"{section}.{key}={'null' if value is None else value}"
            for section, keys in row["patch"].items()
            for key, value in keys.items()
        ]
        config = load_plan("jetmoe_8b", ["training.global_batch_size=1024", *changes])
        assert config.layout(32).data == row["data"]


def test_every_layout_is_tried() -> None:
    config = load_plan("demo", [])
    found = {
        (c.layout.tensor, c.layout.pipeline, c.layout.virtual_pipeline, c.layout.expert)
        for c in candidates(config, 4, load_hardware("h100"))
    }
    expected = {(t, p, None, e) for t in (1, 2, 4) for p in (1, 2, 4) for e in (1, 2, 4) if 4 % (t * p) == 0}
    expected = {(t, p, v, e) for t, p, v, e in expected if 4 // p % e == 0}
    assert expected <= found
    assert {layout[2] for layout in found if layout[1] == 2} == {None, 2}


def test_the_parameters_of_a_layout_are_laid_out_once() -> None:
    """Whatever the micro-batches and the recomputation: models of hundreds of layers have many of each."""
    shards.buffers.cache_clear()
    found = list(candidates(load_plan("demo", []), 4, load_hardware("h100")))
    stages = {(c.layout, stage) for c in found for stage in (0, c.layout.pipeline - 1)}
    assert shards.buffers.cache_info().misses == len(stages) < len(found)


def test_memory_pressure_brings_recomputation(tmp_path: Path) -> None:
    config = load_plan("jetmoe_8b", ["training.global_batch_size=1024"])
    hardware = load_hardware("h100")
    roomy = {c.config.training.recompute for c in candidates(config, 32, hardware, [1])}
    tight = hardware.model_copy(update={"memory_gb": hardware.memory_gb.model_copy(update={"value": 30.0})})
    assert roomy == {"none"}
    assert {c.config.training.recompute for c in candidates(config, 32, tight, [1])} > {"none"}


def test_volumes_by_hand() -> None:
    model = small_model()
    hidden, width, layers = 32, 32, 4
    work = Workload(model, make_layout(4, tensor=2, expert=4), 16, 2, 2)
    tensor, expert = exchanged_bytes(work, "none", layers)
    whole, tokens, k = 32, 16, 2
    assert tensor == layers * 2 * 0.5 * (3 * whole * hidden + 4 * tokens * k * width)
    assert expert == layers * 2 * 0.75 * (4 * tokens * k * hidden + 4 * tokens * k * (hidden + width))
    gathering = replace(work, dispatcher="allgather")  # each row goes to 3 others instead of 0.75
    assert exchanged_bytes(gathering, "none", layers) == (tensor, 4 * expert)
    home = tokens * k
    assert dispatch_bytes(gathering) == (home + 4 * home + home) * 32 * 2 and dispatch_bytes(work) == 3 * home * 32 * 2
    alone = Workload(model, make_layout(4), 16, 2, 2)
    assert exchanged_bytes(alone, "none", layers) == (0, 0)


def test_operations_are_the_model_s_own() -> None:
    model = small_model()
    work = Workload(model, make_layout(1), 16, 2, 2)
    whole = 3 * forward_flops(work, True, model.num_layers)
    assert whole == pytest.approx(model.flops_per_token(16) * 32)
    halves = Workload(model, make_layout(2, tensor=2), 16, 2, 2)
    assert forward_flops(halves, True, model.num_layers) == pytest.approx(whole / 6)


def test_gradients_reduced() -> None:
    model = small_model()
    shape = make_layout(2)
    reduced, gathered = reduced_bytes(shards.buffers(model, shape, 0))
    assert reduced == pytest.approx(4 * model.num_parameters() / 2, rel=0.05) and gathered == reduced / 2


def test_calibration_finds_the_efficiency_that_was_measured(capsys, tmp_path: Path) -> None:
    config, hardware = load_plan("jetmoe_8b", []), load_hardware("h100")
    slower = hardware.compute_efficiency.model_copy(update={"value": 0.21})
    true = evaluate(config, config.layout(96), hardware.model_copy(update={"compute_efficiency": slower}))
    rate = config.tokens_per_step / true.time.seconds
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"tokens_per_second": rate}) + "\n" for _ in range(3)), encoding="utf-8")
    answer = ask(capsys, "jetmoe_8b", "--nodes", "12", "--calibrate", str(metrics))
    assert answer["compute_efficiency"]["value"] == pytest.approx(0.21, rel=1e-6)
    assert "calibrated by" in answer["compute_efficiency"]["source"]
    metrics.write_text('{"tokens_per_second": 1e-9}\n', encoding="utf-8")
    assert main(["plan", "layout", "jetmoe_8b", "--nodes", "12", "--calibrate", str(metrics)]) == 2
    assert "is more than 96 h100 could take" in capsys.readouterr().err


@pytest.mark.parametrize("offload", ["null", "torch"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_memory_is_that_of_plan_memory(precision: str, offload: str) -> None:
    overrides = [f"training.precision={precision}", f"optimizer.offload={offload}", "data.document_mask=true"]
    config = load_plan("jetmoe_8b", [*overrides, "parallel.pipeline=2", "parallel.expert=4"])
    shape = config.layout(16)
    found = evaluate(config, shape, load_hardware("h100"))
    ranks = [memory.rank_bytes(config, shape, place) for place in shards.places(shape)]
    assert found.bytes == max(rank["total"] for rank in ranks)
    assert found.bytes_worst == max(rank["total_worst"] for rank in ranks)


def test_what_is_set_stays_as_it_is(capsys) -> None:
    free = ["plan", "layout", "jetmoe_8b", "--nodes", "12", "--best", "1000", "--json"]
    keys = ("tensor", "pipeline", "virtual_pipeline", "expert", "micro_batch_size", "recompute")

    def found(*overrides: str) -> list[dict]:
        assert main([*free, *overrides]) == 0
        return [{key: each[key] for key in keys} for each in json.loads(capsys.readouterr().out)["best"]]

    every = found()
    for name, section, value in (
        ("expert", "parallel", 4),
        ("pipeline", "parallel", 2),
        ("recompute", "training", "full"),
    ):
        some = found(f"{section}.{name}={value}")
        assert some and {each[name] for each in some} == {value}
        if section == "parallel":
            assert some == [each for each in every if each[name] == value] != every
    assert {each["micro_batch_size"] for each in found("training.micro_batch_size=2", "parallel.expert=8")} == {2}


def test_the_table_ends_with_a_patch(capsys) -> None:
    assert main(["plan", "layout", "jetmoe_8b", "--nodes", "12"]) == 0
    text = capsys.readouterr().out
    assert "parallel:\n  tensor:" in text and "legal layouts fit" in text and "assumption" in text


def test_cost_without_a_speed_takes_the_layout_s(capsys) -> None:
    assert main(["plan", "cost", "jetmoe_8b", "--nodes", "12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    config = load_plan("jetmoe_8b", [])
    expected = evaluate(config, config.layout(96), load_hardware("h100"))
    assert answer["mfu"] == pytest.approx(expected.mfu) and "plan layout" in answer["speed_from"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["jetmoe_8b", "--nodes", "12", "--calibrate", "nowhere"], "nowhere"),
        (["jetmoe_8b", "--nodes", "12", "--contestant", "ours-share"], "--measured names"),
        (["jetmoe_8b", "--nodes", "12", "--micro-batch", "1000"], "or --micro-batch"),
        (["jetmoe_8b", "--nodes", "12", "--micro-batch", "1", "training.micro_batch_size=1"], "not both"),
        (["jetmoe_8b", "--nodes", "12", "parallel.pipeline=5"], "or leave out pipeline"),
        (
            [
                "jetmoe_8b",
                "model.num_layers=1",
                "model.attention.num_kv_heads=1",
                "training.global_batch_size=7",
            ],
            "no layout divides this run",
        ),
        (
            ["jetmoe_8b", "--nodes", "1", "model.hidden_size=32768", "model.mlp.ffn_hidden_size=131072"],
            "fits",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], expected: str, capsys) -> None:
    assert main(["plan", "layout", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
