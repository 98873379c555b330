"""Fits: the replication's constants from its points, synthetic laws recovered from noisy runs, and bad
input."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.cli import main
from moe_train.errors import UserError
from moe_train.plan import scaling
from moe_train.plan.fit_data import Run, load_runs, smoothed, with_curves
from moe_train.plan.fit_frontier import fit_envelope, fit_isoflop
from moe_train.plan.fit_parametric import fit_parametric, huber_sum
from moe_train.plan.fit_sparsity import fit_sparsity
from moe_train.plan.law_file import load_law
from moe_train.plan.sparsity import SparsityLaw, active_share
from moe_train.training.run_folder import RunFolder

POINTS = str(Path(__file__).with_name("chinchilla_points.csv"))
"""Chinchilla's Figure 4 as read off by Besiroglu et al. (github.com/epoch-research/analyzing-chinchilla):
245 points."""


def isoflop_runs(law: scaling.ParametricLaw, noise: float = 0.0, seed: int = 0) -> list[Run]:
    """Five budgets, nine sizes each, around the law's own optimum."""
    random, runs = np.random.default_rng(seed), []
    for flops in np.geomspace(1e18, 1e22, 5):
        for factor in np.geomspace(0.25, 4.0, 9):
            params = law.frontier.at_flops(flops).params * factor
            tokens = flops / 6 / params
            loss = law.loss(params, tokens) * math.exp(random.normal(0, noise))
            runs.append(Run("synthetic", params, tokens, loss, params))
    return runs


def test_the_replication_s_constants_are_within_its_standard_errors() -> None:
    runs = load_runs([POINTS], drop_highest=5)
    assert len(runs) == 240 and len(load_runs([POINTS])) == 245
    fit = fit_parametric(runs, bootstraps=20, starts=8)
    assert fit.objective == pytest.approx(1.018274e-3, rel=1e-5)
    for name, error in scaling.REPLICATION_ERRORS.items():
        assert abs(getattr(fit.law, name) - getattr(scaling.REPLICATION, name)) < error, name
    assert fit.law.frontier.a == pytest.approx(0.5126, abs=0.02)
    assert fit.law.A == pytest.approx(477.83, rel=1e-3) and fit.law.B == pytest.approx(2143.4, rel=1e-3)
    for name, (low, high) in fit.intervals.items():
        assert low < high, name
    assert fit.intervals["a"][0] < 0.514 < fit.intervals["a"][1]


def test_the_gradient_is_the_objective_s() -> None:
    random = np.random.default_rng(0)
    data = random.uniform(16, 22, 30), random.uniform(20, 26, 30), np.log(random.uniform(2, 4, 30))
    point = np.array([6.0, 7.0, 0.5, 0.34, 0.36])
    _, gradient = huber_sum(point, *data)
    for index in range(5):
        step = np.zeros(5)
        step[index] = 1e-6
        slope = (huber_sum(point + step, *data)[0] - huber_sum(point - step, *data)[0]) / 2e-6
        assert gradient[index] == pytest.approx(slope, rel=1e-3, abs=1e-7)


LAWS = st.builds(
    scaling.ParametricLaw,
    E=st.floats(1.3, 2.2),
    A=st.floats(100, 900),
    B=st.floats(300, 3000),
    alpha=st.floats(0.28, 0.42),
    beta=st.floats(0.28, 0.42),
)


@given(LAWS, st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_a_parametric_law_is_recovered_from_noisy_runs(law: scaling.ParametricLaw, seed: int) -> None:
    found = fit_parametric(isoflop_runs(law, noise=5e-4, seed=seed), bootstraps=0, starts=4).law
    assert found.frontier.a == pytest.approx(law.frontier.a, abs=0.03)
    for flops in (1e19, 1e21):
        true, best = law.frontier.at_flops(flops), found.frontier.at_flops(flops)
        assert found.loss(true.params, true.tokens) == pytest.approx(law.loss(true.params, true.tokens), rel=2e-3)
        assert best.params == pytest.approx(true.params, rel=0.25)


@given(LAWS, st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_isoflop_profiles_recover_the_frontier(law: scaling.ParametricLaw, seed: int) -> None:
    found = fit_isoflop(isoflop_runs(law, noise=5e-4, seed=seed), bootstraps=0)
    assert len(found.profiles) == 5
    assert found.law.a == pytest.approx(law.frontier.a, abs=0.05)
    assert found.law.at_flops(1e20).params == pytest.approx(law.frontier.at_flops(1e20).params, rel=0.3)


def test_the_envelope_of_curves_recovers_the_frontier() -> None:
    law, runs = scaling.REPLICATION, []
    for params in np.geomspace(1e7, 1e10, 25):
        tokens = np.geomspace(params, params * 400, 60)
        curve = tuple((float(d), law.loss(params, d)) for d in tokens)
        runs.append(Run("curve", params, float(tokens[-1]), curve[-1][1], params, curve=curve))
    found = fit_envelope(runs, bootstraps=20)
    assert found.law.a == pytest.approx(law.frontier.a, abs=0.02)
    assert found.interval[0] < found.interval[1]
    assert found.law.at_flops(1e20).params == pytest.approx(law.frontier.at_flops(1e20).params, rel=0.1)


def curve(params: float, low: float, high: float) -> Run:
    """A run without noise whose curve goes from ``low`` to ``high`` tokens a parameter."""
    points = tuple((float(d), scaling.REPLICATION.loss(params, d)) for d in np.geomspace(low, high, 60) * params)
    return Run("curve", params, points[-1][0], points[-1][1], params, curve=points)


def test_the_envelope_has_no_optimum_where_no_two_sizes_meet() -> None:
    """Two groups of curves, whose budgets have a gap of a factor of 40 between them."""
    small, large = ([curve(size * n, 5, 80) for n in (1, 1.5, 2, 3)] for size in (1e7, 4e8))
    last, first = (max(6 * run.params * run.tokens for run in small), 6 * 4e8 * 4e8 * 5)
    assert first > 10 * last
    points = fit_envelope(small + large, bootstraps=0).points
    assert min(flops for flops, _ in points) < last and max(flops for flops, _ in points) > first
    assert not [flops for flops, _ in points if last < flops < first], "optima at budgets that no curve reaches"


@pytest.mark.parametrize(
    "curves",
    [
        [curve(params, 15, 30) for params in (1e9, 1e6, 1e7, 1e8)],
        [curve(params, 1, 400) for params in (1e7, 1e7, 4e7)],
    ],
    ids=["none meet", "one crossing"],
)
def test_there_is_no_envelope_where_the_best_size_hardly_changes(curves: list[Run]) -> None:
    with pytest.raises(UserError, match="the best size changes too seldom along these curves"):
        fit_envelope(curves, bootstraps=0)


def test_a_sparsity_law_is_recovered() -> None:
    """Of other constants than the published ones, which the fit starts from."""
    true = SparsityLaw(a=9000, alpha=0.57, b=7000, beta=0.41, c=0.5, lam=-0.12, d=15, delta=0.14, gamma=0.155, e=0.9)
    random, runs = np.random.default_rng(1), []
    for flops in (3e19, 1e20, 3e20, 1e21):
        for total in np.geomspace(2e8, 2e10, 6):
            for sparsity in (0.0, 0.5, 0.75, 0.9):
                active = total * active_share(sparsity)
                tokens = flops / 6 / active
                loss = true.loss(total, tokens, sparsity) * math.exp(random.normal(0, 3e-4))
                runs.append(Run("synthetic", active, tokens, loss, total, sparsity))
    found = fit_sparsity(runs, starts=3)
    assert found.mean_squared_error < 1e-5
    for params, tokens, sparsity in ((1e9, 2e10, 0.0), (1e9, 2e10, 0.75), (8e9, 2e10, 0.9)):
        assert found.law.loss(params, tokens, sparsity) == pytest.approx(true.loss(params, tokens, sparsity), rel=3e-3)


def write_csv(path: Path, runs: list[Run]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["params", "tokens", "loss"])
        writer.writerows([run.params, run.tokens, run.loss] for run in runs)
    return str(path)


def test_the_fitted_law_is_a_file_that_compute_optimal_takes(tmp_path: Path, capsys) -> None:
    points = write_csv(tmp_path / "runs.csv", isoflop_runs(scaling.REPLICATION, noise=2e-4))
    law, picture = tmp_path / "law.json", tmp_path / "law.png"
    options = ["--out", str(law), "--plot", str(picture), "--bootstraps", "12", "--starts", "4"]
    assert main(["plan", "fit", points, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] == 45 and report["isoflop"]["frontier"]["a"] == pytest.approx(0.5126, abs=0.03)
    assert "sparsities" in report["sparsity"]["none_because"]
    assert load_law(law).parametric.alpha == pytest.approx(0.3478, abs=0.02)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "compute-optimal", "--flops", "1e21", "--law", str(law), "--json"]) == 0
    assert "fitted" in json.loads(capsys.readouterr().out)["approaches"]
    assert main(["plan", "fit", points, "--bootstraps", "0", "--starts", "2"]) == 0
    assert "compute-optimal exponents" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_constants_that_noisy_runs_leave_open_have_no_interval(tmp_path: Path, capsys) -> None:
    """Some resamplings put one of them beyond what a number holds: the report stays JSON."""
    noise = random.Random(0)
    runs = [
        Run("", params, tokens, 2 + noise.random(), params)
        for params in (1e8, 3e8, 1e9, 3e9)
        for tokens in (2e9, 1e10, 5e10)
    ]
    assert (
        main(["plan", "fit", write_csv(tmp_path / "r.csv", runs), "--bootstraps", "8", "--starts", "5", "--json"]) == 0
    )
    text = capsys.readouterr().out
    assert "Infinity" not in text and "NaN" not in text
    parametric = json.loads(text)["parametric"]
    assert "A" not in parametric["intervals"] and "E" in parametric["intervals"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a complete run of 100 steps."""
    (tmp_path / "config.yaml").write_text("model: {num_layers: 2, mlp: {num_experts: 8, top_k: 2}}\n", encoding="utf-8")
    lines = [json.dumps({"tokens": 100 * n, "loss": 5 - 0.01 * n}) for n in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    RunFolder(tmp_path).finish(0, "complete", 100)
    return tmp_path


def test_a_run_s_folder_is_a_run(folder: Path) -> None:
    (run,) = load_runs([str(folder)])
    assert run.tokens == 10000 and run.loss == pytest.approx(4.005) and run.sparsity == 0.75
    assert run.params < run.total_params and len(run.curve) == 96
    assert with_curves([run]) == [run]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ({"code": 6, "reason": "step 281: loss 4.171 is a spike"}, "step 281: loss 4.171 is a spike"),
        ({"code": 1, "reason": "shapes differ:\n  2 and 3"}, "shapes differ: 2 and 3"),
        ({"code": None, "reason": "running"}, "running"),
        ([], "outcome.json cannot be read"),
    ],
)
def test_a_run_that_is_not_complete_is_refused_with_its_reason(folder: Path, outcome, reason: str, capsys) -> None:
    (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    assert main(["plan", "fit", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{folder} is not a complete run" in error and reason in error and error.count("\n") == 1


def test_a_folder_that_does_not_say_how_its_run_ended_is_refused(folder: Path) -> None:
    (folder / "outcome.json").unlink()
    with pytest.raises(UserError, match="it needs config.yaml, metrics.jsonl and outcome.json"):
        load_runs([str(folder)])


def test_smoothing_is_a_running_mean() -> None:
    points = [(float(n), float(n)) for n in range(100)]
    assert smoothed(points)[0] == (2.0, 2.0) and smoothed(points)[-1] == (97.0, 97.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params,tokens,loss\n1e9,2e10,2.5\n2e9,2e10,2.4\n3e9,2e10,2.3\n", "3 run(s) are too few"),
        ("params,tokens,loss\n1e9,-2e10,2.5\n", "runs.csv:2: params, tokens, loss must be more than 0"),
        ("params,tokens,loss\n1e6,1e8,3\n1e6,0,3\n", "runs.csv:3: params, tokens, loss must be more than 0"),
        ("params,flops,loss\n0,1e15,3\n", "runs.csv:2: params, flops, loss must be more than 0"),
        ("params,tokens,loss,sparsity\n1e9,2e10,2.5,0.5\n", "runs.csv:2: sparsity 0.5 needs a column total_params"),
        ("params,tokens,loss\n1e9,many,2.5\n", "runs.csv:2: tokens is not a number"),
        ("params,tokens,loss,sparsity\n1e9,2e10,2.5,1\n", "sparsity from 0 to less than 1"),
        ("size,loss\n1,2\n", "runs.csv:1: needs the columns"),
        ("params,tokens,loss\n", "holds no runs"),
        ("params,tokens,loss\n" + "1e9,2e10,2.5\n" * 9, "fewer than 3 different params"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(text: str, expected: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "runs.csv").write_text(text, encoding="utf-8")
    assert main(["plan", "fit", str(tmp_path / "runs.csv")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_csv_as_a_spreadsheet_saves_it(tmp_path: Path, capsys) -> None:
    """With a mark in front of UTF-8; in another encoding it is one line, not a bug's."""
    path, text = tmp_path / "runs.csv", "params,tokens,loss\n1e9,2e10,2.5\n"
    path.write_text(text, encoding="utf-8-sig")
    assert [(run.params, run.tokens, run.loss) for run in load_runs([str(path)])] == [(1e9, 2e10, 2.5)]
    path.write_text(text, encoding="utf-16")
    assert main(["plan", "fit", str(path)]) == 2
    error = capsys.readouterr().err
    assert "runs.csv: is not a CSV in UTF-8" in error and error.count("\n") == 1


def test_what_is_no_run_is_said(tmp_path: Path, capsys) -> None:
    assert main(["plan", "fit", str(tmp_path)]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
    assert main(["plan", "fit", str(tmp_path / "absent")]) == 2
    assert "neither a run's folder nor a .csv file" in capsys.readouterr().err
