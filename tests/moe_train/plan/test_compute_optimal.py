"""`moe-train plan compute-optimal`: one budget, four answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.plan.law_file import save_law
from moe_train.plan.scaling import REPLICATION
from moe_train.plan.sparsity import ABNAR


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", "compute-optimal", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_every_approach_in_plain_units(capsys) -> None:
    report = ask(capsys, "--flops", "5.76e23")
    sizes = {name: row["params"] for name, row in report["approaches"].items()}
    assert sizes == pytest.approx({"1": 67.8e9, "2": 63.4e9, "3": 40.4e9, "replication": 72.2e9}, rel=0.003)
    for row in report["approaches"].values():
        assert 6 * row["params"] * row["tokens"] == pytest.approx(5.76e23)
        assert 1.9 < row["loss"] < 2.0 and len(row["outside_fitted_range"]) == 3
        assert row["flops_appendix_f"] == pytest.approx(row["flops"], rel=0.1)
    assert report["sparsity"]["outside_fitted_range"]


def test_gpu_hours_are_a_budget(capsys) -> None:
    report = ask(capsys, "--gpu-hours", "30000", "--gpu", "h100", "--mfu", "0.4")
    assert report["given"]["amount"] == pytest.approx(30000 * 3600 * 989.4e12 * 0.4)


@pytest.mark.parametrize("option", ["params", "tokens"])
def test_a_size_or_tokens_are_kept(option: str, capsys) -> None:
    report = ask(capsys, f"--{option}", "8B")
    assert all(row[option] == pytest.approx(8e9) for row in report["approaches"].values())


@pytest.mark.parametrize("budget", [("--params", "1e300"), ("--tokens", "1e-300")])
def test_what_no_number_can_hold_is_one_line(budget: tuple[str, str], capsys) -> None:
    assert main(["plan", "compute-optimal", *budget]) == 2
    error = capsys.readouterr().err
    assert "so far out" in error and error.count("\n") == 1


def test_sparsity_at_fixed_and_free_total(capsys) -> None:
    report = ask(capsys, "--flops", "1e20", "--total-params", "2B", "--sparsity", "0.8")["sparsity"]
    (fixed,) = report["fixed_total"]
    assert fixed["params"] == pytest.approx(2e9) and 0.5 < fixed["sparsity"] < 0.95
    assert report["free"]["loss"] <= fixed["loss"] and 0.8 in [row["sparsity"] for row in report["by_sparsity"]]


def test_a_fitted_law_stands_beside_the_others(capsys, tmp_path: Path) -> None:
    constants = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    save_law(tmp_path / "law.json", {"parametric": {"constants": constants}})
    rows = ask(capsys, "--flops", "1e21", "--law", str(tmp_path / "law.json"))["approaches"]
    assert rows["fitted"]["outside_fitted_range"] == []
    assert rows["fitted"] == {**rows["replication"], "outside_fitted_range": []}


def test_a_fitted_law_knows_its_own_range_and_sparsity_law(capsys, tmp_path: Path) -> None:
    report = {
        "parametric": {"constants": asdict(REPLICATION)},
        "sparsity": {"constants": asdict(ABNAR)},
        "range": {"flops": [1e15, 1e17], "params": [1e6, 1e8], "sparsity": [0.0, 0.75]},
    }
    save_law(tmp_path / "law.json", report)
    answer = ask(capsys, "--flops", "1e19", "--law", str(tmp_path / "law.json"))
    (flops, params) = answer["approaches"]["fitted"]["outside_fitted_range"]
    assert "100 times the largest" in flops and "params" in params
    assert answer["sparsity"]["law"] == "fitted" and answer["sparsity"]["free"]["sparsity"] <= 0.75
    assert "1e+17" in answer["sparsity"]["outside_fitted_range"][0]


def test_the_table_says_what_is_extrapolated(capsys) -> None:
    assert main(["plan", "compute-optimal", "--flops", "5.76e23"]) == 0
    text = capsys.readouterr().out
    assert "67.82B" in text and "192 times the largest fitted" in text and "sparsity law" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--flops", "-1e21"], "--flops must be more than 0"),
        (["--flops", "lots"], "--flops 'lots' is not a number"),
        ([], "give one of --flops"),
        (["--flops", "1e21", "--tokens", "1B"], "give one of --flops"),
        (["--flops", "1e21", "--sparsity", "1"], "a sparsity of 1 is out of range"),
        (["--flops", "1e21", "--total-params", "0"], "--total-params must be more than 0"),
        (["--gpu-hours", "10", "--mfu", "1.5"], "--mfu must be more than 0 and at most 1"),
        (["--gpu-hours", "10", "--gpu", "h1000"], "h100"),
        (["--flops", "1e21", "--mfu", "0.3"], "--mfu says what --gpu-hours are worth"),
        (["--flops", "1e21", "--law", "nowhere.json"], "--law nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], expected: str, capsys) -> None:
    assert main(["plan", "compute-optimal", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
