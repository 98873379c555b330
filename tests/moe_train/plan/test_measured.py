"""A measured step of one GPU in the place of the modelled computation. The figures are made up here: nobody measured
them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.plan.hardware import load_hardware
from moe_train.plan.layouts import evaluate
from moe_train.plan.measured import read_measured
from moe_train.plan.run_file import load_plan

LAYERS, MICRO_BATCHES = 8, 4
LAYER, HEAD, IDLE, UPDATE = 0.010, 0.004, 0.003, 0.050
"""Seconds: of a layer and of the head in one micro-batch, of nothing in a step, of the optimizer."""
STEP = MICRO_BATCHES * (LAYERS * LAYER + HEAD) + IDLE + UPDATE


def slice_parameters() -> int:
    return load_plan("jetmoe_8b", []).model.model_copy(update={"num_layers": LAYERS}).num_parameters()


def benchmark_line(**changes) -> dict:
    """What h100_step.py would print of a GPU with these times; profiled steps are longer by what is idle."""
    parts = {"attention": 0.4, "experts": 0.6}
    milliseconds = {name: 1e3 * share * MICRO_BATCHES * LAYERS * LAYER for name, share in parts.items()}
    milliseconds |= {"head": 1e3 * MICRO_BATCHES * HEAD, "optimizer": 1e3 * UPDATE, "idle": 40.0}
    step = {
        "step_seconds": STEP,
        "tokens_per_second": MICRO_BATCHES * 4096 / STEP,
        "mfu": 0.4,
        "milliseconds": milliseconds,
    }
    parameters = slice_parameters()
    return {
        "benchmark": "h100_step",
        "date": "2000-01-01",
        "device": "NVIDIA H100 80GB HBM3",
        "layers": LAYERS,
        "parameters": parameters,
        "batch": [MICRO_BATCHES, 1, 4096],
        "recompute": "none",
        "contestants": {
            "ours": {"parameters": parameters, "balanced": step},
            "ours-share": {"parameters": parameters // 4, "balanced": step},
            "ours-fp8-mxfp8": {"error": "EngineError: not for this device"},
            "ours-te": {"parameters": parameters, "learned": {key: step[key] for key in step if key != "milliseconds"}},
        },
        **changes,
    }


@pytest.fixture
def line(tmp_path: Path) -> str:
    (tmp_path / "line.json").write_text(json.dumps(benchmark_line()) + "\n", encoding="utf-8")
    return str(tmp_path / "line.json")


def ask(capsys, *arguments: str) -> dict:
    assert main(["plan", "layout", "jetmoe_8b", "--nodes", "12", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_step_is_taken_apart(line: str) -> None:
    measured = read_measured(line, "ours", "balanced")
    assert measured.layer_seconds == pytest.approx(LAYER + IDLE / LAYERS / MICRO_BATCHES)
    assert measured.compute(6) == pytest.approx(6 * measured.layer_seconds + HEAD)
    whole = MICRO_BATCHES * measured.compute(LAYERS) + measured.update(measured.parameters)
    assert whole == pytest.approx(STEP)


def test_extrapolated_by_hand(capsys, line: str) -> None:
    answer = ask(capsys, "--measured", line, "--best", "1000")
    assert answer["compute_efficiency"] is None and answer["measured"]["step_seconds"] == pytest.approx(STEP)
    assert all(
        row["tensor"] == 1 and row["micro_batch_size"] == 1 and row["recompute"] == "none" for row in answer["best"]
    )
    (row,) = [
        row for row in answer["best"] if (row["pipeline"], row["virtual_pipeline"], row["expert"]) == (2, None, 8)
    ]
    config, hardware = load_plan("jetmoe_8b", []), load_hardware("h100")
    count = config.training.global_batch_size // 48
    measured = read_measured(line, "ours", "balanced")
    assert row["seconds"]["compute"] == pytest.approx(count * measured.compute(12))
    # Communication is the modelled one.
    changes = ["parallel.pipeline=2", "parallel.expert=8", "training.recompute=none"]
    modelled = evaluate(load_plan("jetmoe_8b", changes), load_plan("jetmoe_8b", changes).layout(96), hardware)
    assert row["seconds"]["expert"] == pytest.approx(modelled.time.expert) and modelled.time.expert > 0
    assert row["traffic_bytes"]["data"] == pytest.approx(modelled.time.traffic["data"])
    sent = row["seconds"]["expert"] + row["seconds"]["pipeline"]
    assert row["seconds"]["bubble"] == pytest.approx((row["seconds"]["compute"] + sent) / count)
    parts = sum(row["seconds"].values())
    assert row["step_seconds"] == pytest.approx(parts)
    assert row["tokens_per_second_per_gpu"] == pytest.approx(config.tokens_per_step / parts / 96)


def test_what_a_benchmark_that_was_cut_off_has_left(capsys, tmp_path: Path, line: str) -> None:
    """Its results.json: the same object, with the contestants that were measured by then."""
    whole = benchmark_line()
    first = {"ours": whole["contestants"]["ours"]}
    cut = tmp_path / "results.json"
    cut.write_text(json.dumps({**whole, "contestants": first, "ratios": {"ours": {"balanced": 1.0}}}) + "\n")
    assert ask(capsys, "--measured", str(cut))["best"] == ask(capsys, "--measured", line)["best"]
    for contestants, there in ((first, "there is ours (balanced)"), ({}, "there is none of ours")):
        cut.write_text(json.dumps({**whole, "contestants": contestants, "ratios": {}}) + "\n")
        arguments = ["--measured", str(cut), "--contestant", "ours-share"]
        assert main(["plan", "layout", "jetmoe_8b", "--nodes", "12", *arguments]) == 2
        error = capsys.readouterr().err
        assert f"no ours-share with balanced routing in it; {there}" in error and error.count("\n") == 1


def test_a_share_is_of_its_own_expert_ranks_alone(capsys, line: str) -> None:
    answer = ask(capsys, "--measured", line, "--contestant", "ours-share", "--best", "1000")
    assert {row["expert"] for row in answer["best"]} == {8}
    assert any("one of 8" in each for each in answer["assumptions"])


def test_measured_and_extrapolated_are_told_apart(capsys, line: str) -> None:
    assert main(["plan", "layout", "jetmoe_8b", "--nodes", "12", "--measured", line]) == 0
    text = capsys.readouterr().out
    measured, assumed, extrapolated = (
        text.index(word) for word in ("MEASURED on one NVIDIA", "ASSUMED:", "EXTRAPOLATED, measured by nobody")
    )
    assert measured < assumed < extrapolated < text.index("tokens/s/GPU")
    assert "nvlink_efficiency 0.7: assumption" in text and "compute efficiency" not in text
    assert f"{MICRO_BATCHES * 4096 / STEP:,.0f} tokens/s, MFU 40.0%" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--contestant", "ours-fp8-mxfp8"], "not for this device"),
        (["--contestant", "megatron-te"], "there is ours (balanced)"),
        (["--routing", "learned"], "there is ours (balanced)"),
        (["--contestant", "ours-te", "--routing", "learned"], "without --quick"),
        (["--micro-batch", "2"], "leave it out"),
        (["--calibrate", "metrics.jsonl"], "not both"),
    ],
)
def test_what_cannot_be(capsys, line: str, arguments: list[str], says: str) -> None:
    assert main(["plan", "layout", "jetmoe_8b", "--nodes", "12", "--measured", line, *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[1]", "3", '{"a":', "\x00"])
def test_what_is_no_object(capsys, tmp_path: Path, text: str) -> None:
    (tmp_path / "line.json").write_text(text, encoding="utf-8")
    assert main(["plan", "layout", "jetmoe_8b", "--measured", str(tmp_path / "line.json")]) == 2
    error = capsys.readouterr().err
    assert "is not one JSON object" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parameters": 7}, "a slice of the same model"),
        ({"batch": [4, 1, 2048]}, "measured at 2048 tokens"),
        ({"device": "CPU"}, "which is no h100"),
        ({"contestants": {"ours": {"balanced": {"milliseconds": {}}}}}, "missing"),
        ({"contestants": {}}, "none of ours"),
    ],
)
def test_of_something_else(capsys, tmp_path: Path, changes: dict, says: str) -> None:
    file = tmp_path / "line.json"
    file.write_text(json.dumps(benchmark_line(**changes)), encoding="utf-8")
    assert main(["plan", "layout", "jetmoe_8b", "--nodes", "12", "--measured", str(file)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"), [(None, "No such file"), ("{", "not one JSON object"), ("[1]", "missing"), ("{}", "missing")]
)
def test_unreadable(capsys, tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "there.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    assert main(["plan", "layout", "jetmoe_8b", "--measured", str(file)]) == 2
    assert says in capsys.readouterr().err


def test_a_profile_will_do(capsys, tmp_path: Path) -> None:
    """profile.json of `moe-train profile --nproc 1`, in seconds."""
    line = benchmark_line()
    step = line["contestants"]["ours"]["balanced"]
    parts = {name: spent / 1e3 for name, spent in step["milliseconds"].items() if name != "idle"}
    profile = {
        "device": line["device"],
        **{key: step[key] for key in ("step_seconds", "tokens_per_second", "mfu")},
        "parts": parts,
        "slice": {
            "world_size": 1,
            "layers": LAYERS,
            "parameters": line["parameters"],
            "micro_batches": MICRO_BATCHES,
            "micro_batch_size": 1,
            "sequence_length": 4096,
            "precision": "bf16",
            "recompute": "none",
        },
    }
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(profile), encoding="utf-8")
    (tmp_path / "line.json").write_text(json.dumps(line), encoding="utf-8")
    assert (
        ask(capsys, "--measured", str(file))["best"] == ask(capsys, "--measured", str(tmp_path / "line.json"))["best"]
    )
    profile["slice"]["world_size"] = 2
    file.write_text(json.dumps(profile), encoding="utf-8")
    assert main(["plan", "layout", "jetmoe_8b", "--measured", str(file)]) == 2
    assert "--nproc 1" in capsys.readouterr().err
