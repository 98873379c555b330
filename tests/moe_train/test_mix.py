"""`moe-train mix` and `pretrain --dry-run` on small corpora, through the command line as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.indexed import IndexedWriter
from data_pipeline.ledger import Ledger
from data_pipeline.report import plan
from moe_train.cli import main
from moe_train.config import load_run

MODEL = (
    "vocab_size: 64\nhidden_size: 16\nnum_layers: 2\n"
    "attention: {num_kv_heads: 2, head_dim: 8}\nmlp: {ffn_hidden_size: 24}\n"
)
MIXTURE = (
    "sequence_length: 32\nseed: 1\n"
    "sources: {a: {paths: [a.bin]}, b: {paths: [b.bin]}}\nphases:\n"
    "- {name: first, tokens: 6400, weights: {a: 3, b: 1}}\n- {name: second, tokens: 3200, weights: {a: 1, b: 1}}\n"
)
RUN = "output_dir: out\nmodel: model.yaml\ndata: {mixture: mix.yaml}\ntraining: {global_batch_size: 8}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"run.yaml": RUN, "model.yaml": MODEL, "mix.yaml": MIXTURE}.items():
        (tmp_path / name).write_text(text)
    for number, name in enumerate("ab"):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add(np.random.default_rng(number).integers(0, 64, 4000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize("name", ["mix.yaml", "run.yaml"])
def test_a_mixture_or_a_run_file(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(printed(capsys, "mix", name, "--json"))
    assert [phase["samples"] for phase in table["phases"]] == [200, 100]
    assert {row["source"]: row["samples"] for row in table["phases"][0]["sources"]} == {"a": 150, "b": 50}
    text = printed(capsys, "mix", name)
    assert "first: 6.4K tokens" in text and "whole run: 9.6K tokens" in text and "75.00%" in text


def test_against_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "other.yaml").write_text(MIXTURE.replace("{a: 3, b: 1}", "{a: 1, b: 1}"))
    rows = json.loads(printed(capsys, "mix", "mix.yaml", "--against", "other.yaml", "--json"))["sources"]
    assert {row["source"]: row["difference"] for row in rows} == {"a": -50 * 32, "b": 50 * 32}
    assert "+1.6K" in printed(capsys, "mix", "mix.yaml", "--against", "other.yaml")


def start_run(folder: Path, tokens: int) -> None:
    """What a run leaves behind that `mix` reads, the last line cut short by a crash."""
    (folder / "out").mkdir()
    ledger = plan(load_run("run.yaml").mixture)
    (folder / "out/ledger.json").write_text(ledger.to_json())
    lines = [
        json.dumps({"step": 1, "tokens": 256}),
        json.dumps({"step": 2, "tokens": tokens}),
        '{"step": 3, "tok',
    ]
    (folder / "out/metrics.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("name", ["out", "run.yaml"])
def test_history(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(folder, tokens=6400)
    table = json.loads(printed(capsys, "mix", name, "--history", "--json"))
    assert table["position"] == {"samples": 200, "tokens": 6400, "phase": "second"}
    assert {row["source"]: row["consumed_samples"] for row in table["sources"]} == {"a": 150, "b": 50}
    assert [segment["first_sample"] for segment in table["segments"]] == [0, 200]
    assert "segments" in printed(capsys, "mix", name, "--history")


def test_history_before_the_first_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(folder, tokens=0)
    (folder / "out/metrics.jsonl").unlink()
    table = json.loads(printed(capsys, "mix", "out", "--history", "--json"))
    assert table["position"]["samples"] == 0


def test_a_run_that_goes_by_its_ledger(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It answers from its ledger, even when the files have been edited or are gone."""
    start_run(folder, tokens=256)
    for name in ("mix.yaml", "a.bin", "b.bin"):
        (folder / name).unlink()
    assert json.loads(printed(capsys, "mix", "out", "--json"))["samples"] == 300
    assert Ledger.from_json((folder / "out/ledger.json").read_bytes()).num_samples == 300


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gone.yaml"], "there is no file gone.yaml; presets of data: demo, jetmoe"),
        (["run.yaml", "--history"], "has no ledger.json: no run was started there"),
        ([".", "--history"], "has no ledger.json"),
        (["mix.yaml", "--history"], "mix.yaml is a mixture, and --history is a run's"),
        (["mix.yaml", "--history", "--against", "mix.yaml"], "ask one at a time"),
        (["model.yaml"], "unknown key"),
    ],
)
def test_refused(arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, "mix", *arguments)


# --- the dry run --------------------------------------------------------------------------------------------


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return printed(capsys, "pretrain", "run.yaml", "--dry-run", *arguments)


def test_a_dry_run_shows_everything_and_starts_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry(capsys, "--nproc", "2", "parallel.tensor=2", "parallel.expert=2", "optimizer.lr=1e-3")
    model = load_run("run.yaml").model
    for part in (
        "lr: 0.001",
        f"{model.num_parameters():,} parameters, {model.num_active_parameters():,} active",
        "2 ranks = tensor 2 x pipeline 1 x data 1; experts over 2",
        "8 sequences of 32 = 256 tokens a step: 2 x 4 on each data rank",
        "9.6K tokens in 37 steps",
        "first: 6.4K tokens",
        "nothing was started",
    ):
        assert part in text
    assert not (folder / "out").exists()


def test_steps_of_a_batch_that_grows_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry(capsys, "training.batch_size_warmup={start: 4, tokens: 640}", "training.max_steps=5")
    assert "in 40 steps, stopped after 5 (training.max_steps)" in text  # 5 steps of 4 sequences, then 35 of 8


def test_the_number_of_ranks(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "2 ranks = tensor 1 x pipeline 2" in dry(capsys, "parallel.pipeline=2")  # the fewest
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "2 ranks = tensor 1 x pipeline 1 x data 2" in dry(capsys)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["parallel.tensor=2"],
            "parallel.tensor 2 x parallel.pipeline 1 = 2 does not divide the 3 processes",
        ),
        (["data.mixture=jetmoe"], "the environment variable DATA is not set"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    overrides: list[str],
    expected: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DATA", raising=False)
    assert expected in refused(capsys, "pretrain", "run.yaml", "--dry-run", "--nproc", "3", *overrides)


def test_a_missing_corpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.bin").unlink()
    text = refused(capsys, "pretrain", "run.yaml", "--dry-run")
    assert "b.bin" in text and "moe-train prepare" in text
