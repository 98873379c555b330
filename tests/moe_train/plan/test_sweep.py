"""`moe-train plan sweep`: run files that load, spend their budget, and come back through `plan fit`."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.config import load_run
from moe_train.plan import scaling
from moe_train.training.run_folder import RunFolder


def ask(capsys, *arguments: str) -> dict:
    assert main(["plan", "sweep", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_isoflop_runs_spend_their_budget(tmp_path: Path, capsys) -> None:
    out = tmp_path / "sweep"
    runs = ask(capsys, "1e13", "3e13", "--base", "demo", "--out", str(out), "--around", "1M", "--sizes", "5")["runs"]
    assert len(runs) == 10 and len({run["name"] for run in runs}) == 10
    for run in runs:
        config = load_run(out / run["file"])
        assert config.model.num_active_parameters() == run["params"]
        assert config.total_tokens == run["tokens"] == run["steps"] * config.tokens_per_step
        assert 6 * run["params"] * run["tokens"] == run["flops"] == pytest.approx(float(run["name"][1:5]), rel=0.01)
        assert config.output_dir == str(out / run["name"]) and config.layout(1).world_size == 1
        assert config.schedule.warmup.tokens == run["tokens"] // 100
        shares = [phase.tokens / run["tokens"] for phase in config.mixture.phases]
        assert shares == pytest.approx([0.8, 0.2], abs=1e-5)
    with open(out / "sweep.csv", encoding="utf-8", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [run["file"] for run in runs]
    script = out / "sweep.sh"
    assert os.access(script, os.X_OK) and script.read_text(encoding="utf-8").count("moe-train pretrain") == 10


def test_a_sparsity_sweep_changes_the_experts_alone(tmp_path: Path, capsys) -> None:
    options = ["--base", "demo", "--out", str(tmp_path / "s"), "--sizes", "1", "--around", "1M"]
    for sparsity in ("0", "0.5", "0.75"):
        options += ["--sparsity", sparsity]
    runs = ask(capsys, "1e14", *options)["runs"]
    assert [run["sparsity"] for run in runs] == [0.0, 0.5, 0.75]
    models = [load_run(tmp_path / "s" / run["file"]).model for run in runs]
    assert [model.mlp.num_experts for model in models] == [2, 4, 8]
    assert len({model.hidden_size for model in models}) == 1
    assert runs[0]["total_params"] < runs[1]["total_params"] < runs[2]["total_params"]


def test_every_run_has_files_of_its_own(tmp_path: Path, capsys) -> None:
    """Budgets that are near each other; sparsities that come to the same number of experts."""
    options = ["--base", "demo", "--around", "1M", "--sizes", "2", "--sparsity", "0.74", "--sparsity", "0.75"]
    runs = ask(capsys, "1.01e14", "1.04e14", *options, "--out", str(tmp_path / "s"))["runs"]
    assert len(runs) == 4
    for run in runs:
        assert load_run(tmp_path / "s" / run["file"]).total_tokens == run["tokens"]


def test_what_a_sweep_trained_can_be_fitted(tmp_path: Path, capsys) -> None:
    """Run folders with metrics as a run leaves them; their losses follow a known law."""
    out = tmp_path / "sweep"
    budgets = ["1e14", "3e14", "1e15"]
    runs = ask(capsys, *budgets, "--base", "demo", "--out", str(out), "--around", "2M")["runs"]
    law = scaling.ParametricLaw(E=1.8, A=60.0, B=150.0, alpha=0.3478, beta=0.3658)
    for run in runs:
        folder = out / run["name"]
        folder.mkdir()
        (folder / "config.yaml").write_text(load_run(out / run["file"]).to_yaml(), encoding="utf-8")
        lines = [
            {"tokens": run["tokens"] * n // 200, "loss": law.loss(run["params"], run["tokens"] * n / 200)}
            for n in range(1, 201)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        RunFolder(folder).finish(0, "complete", 200)
    folders = [str(out / run["name"]) for run in runs]
    assert main(["plan", "fit", *folders, "--bootstraps", "0", "--starts", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] == len(runs)
    for method, within in (
        ("parametric", 0.03),
        ("isoflop", 0.06),
        ("envelope", 0.15),
    ):  # the last: a few sizes only
        assert report[method]["frontier"]["a"] == pytest.approx(law.frontier.a, abs=within), method


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-1e13"], "budget must be more than 0"),
        (["1e10"], "fewer than 50"),
        (["1e13", "--sizes", "0"], "--sizes must be 1 or more"),
        (["1e13", "--sparsity", "1"], "a sparsity of 1 is out of range"),
        (["1e13", "--around", "1e30"], "more than a model in the base's proportions can have"),
        (["1e13", "--around", "0"], "--around must be more than 0"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], expected: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new"
    options, budgets = [word for word in arguments[1:]], arguments[:1]
    assert main(["plan", "sweep", "--base", "demo", "--out", str(out), *options, "--", *budgets]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").write_text("", encoding="utf-8")
    assert main(["plan", "sweep", "1e13", "--base", "demo", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
