"""`moe-train plan cost` and `plan upcycle`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.plan.upcycle import advise
from moe_train.training.config import BatchSizeWarmup

PAPER = ["jetmoe_8b", "--nodes", "12"]


def ask(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_paper_s_own_setting_is_thirty_thousand_gpu_hours(capsys) -> None:
    """arXiv 2404.07413: 30,000 H100-hours, which 1.25T tokens on 96 GPUs make 11,574 tokens/s a GPU."""
    answer = ask(capsys, "cost", *PAPER, "--price", "2.0", "--tokens-per-second", "11574")
    assert answer["gpu_hours"] == pytest.approx(30000, rel=1e-4) and answer["cost"] == pytest.approx(60000, rel=1e-4)
    assert answer["days"] == pytest.approx(13.02, abs=0.01) and answer["gpus"] == 96
    stable, decay = answer["phases"]
    assert stable["starts_after_days"] == 0
    assert decay["starts_after_days"] == pytest.approx(answer["days"] * 0.8, rel=1e-5)  # the last batch is not whole
    assert decay["first_token"] == 10**12
    assert answer["mfu"] == pytest.approx(11574 * 16.42e9 / 989.4e12, rel=0.002)
    assert answer["kwh"] == pytest.approx(30000 * 1.275, rel=1e-4)


def test_checkpoints_on_disk(capsys) -> None:
    disk = ask(capsys, "cost", *PAPER)["checkpoints"]
    assert disk["bytes_each"] == 14 * 8_522_237_952
    assert disk["written"] == 625 and disk["kept"] == 3 + 12


def test_mfu_and_rate_say_the_same(capsys) -> None:
    rate = ask(capsys, "cost", *PAPER, "--mfu", "0.3")["tokens_per_second_per_gpu"]
    assert ask(capsys, "cost", *PAPER, "--tokens-per-second", str(rate))["mfu"] == pytest.approx(0.3)


def test_measured_throughput_is_the_median(capsys, tmp_path: Path) -> None:
    lines = [{"step": n, "tokens_per_second": 960000.0 if n else 1.0} for n in range(9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    for named in (tmp_path, tmp_path / "metrics.jsonl"):
        answer = ask(capsys, "cost", *PAPER, "--metrics", str(named))
        assert answer["tokens_per_second_per_gpu"] == pytest.approx(10000)


@pytest.mark.parametrize("line", ['{"tokens_per_second": 0}', '{"tokens_per_second": null}', "[1]", "3", "{"])
def test_metrics_that_are_none(capsys, tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
    assert main(["plan", "cost", *PAPER, "--metrics", str(tmp_path)]) == 2
    assert "is not a metrics.jsonl of a run" in capsys.readouterr().err


def test_a_short_run_has_figures_too(capsys) -> None:
    assert (
        main(["plan", "cost", "demo", "--nodes", "1", "training.global_batch_size=32", "--tokens-per-second", "580"])
        == 0
    )
    text = capsys.readouterr().out
    for figure in ("2m52s", "0.381", "0.761 at 2", "63.8 MB"):
        assert figure in text


def test_a_run_that_stops_early_costs_less(capsys) -> None:
    answer = ask(capsys, "cost", *PAPER, "--mfu", "0.3", "training.max_steps=1000")
    assert answer["tokens"] == 1000 * 1008 * 4096 and len(answer["phases"]) == 1


def test_a_batch_that_grows_costs_what_it_is(capsys) -> None:
    """Tokens as the steps take them; checkpoints by steps or by tokens."""
    warmup, tokens = BatchSizeWarmup(start=128, tokens=200_000_000), 0
    for _ in range(300):
        tokens += 4096 * warmup.batch_size(tokens, 1024)
    assert tokens < 0.9 * 300 * 1024 * 4096
    grows = ["training.global_batch_size=1024", "training.batch_size_warmup={start: 128, tokens: 200M}"]
    options = [*grows, "--mfu", "0.3", "training.max_steps=300", "checkpoint.keep_last=1"]
    for interval, written in (("20 steps", 15), ("50M", -(-tokens // 50_000_000))):
        answer = ask(capsys, "cost", *PAPER, *options, f"checkpoint.interval={interval}")
        assert (answer["tokens"], answer["checkpoints"]["written"]) == (tokens, written)
    early = ask(capsys, "cost", *PAPER, *options, "training.max_steps=5")
    assert early["tokens"] == 5 * 128 * 4096


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--price", "-2"], "--price must be more than 0"),
        (["--mfu", "0.3", "--tokens-per-second", "5"], "give one of --mfu"),
        (["--mfu", "30"], "--mfu must be more than 0 and at most 1"),
        (["--metrics", "nowhere"], "nowhere"),
        (["--tokens-per-second", "1e6"], "would be 1658% of the peak of one h100"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], expected: str, capsys) -> None:
    assert main(["plan", "cost", *PAPER, *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("nothing", ["0", "0.0", "0B", " 0"])
def test_no_dense_model_is_none_in_any_unit(nothing: str) -> None:
    assert advise(nothing, "1T")["choice"] == "scratch"


@pytest.mark.parametrize(
    ("dense", "moe", "ratio", "choice"),
    [
        ("300B", "50B", 1, "upcycle"),
        ("300B", "100B", 2, "either"),  # the paper's first case: level
        ("300B", "300B", 2, "scratch"),  # its second: scratch is ahead
        ("1T", "2T", 1, "scratch"),
        ("0", "1T", 2, "scratch"),
    ],
)
def test_skywork_s_rule(dense: str, moe: str, ratio: float, choice: str) -> None:
    answer = advise(dense, moe, ratio)
    assert answer["choice"] == choice and answer["reasons"]


def test_upcycle_on_the_command_line(capsys) -> None:
    answer = ask(capsys, "upcycle", "--dense-tokens", "2T", "--moe-tokens", "500B", "--learning-rate-ratio", "0.1")
    assert answer["ratio"] == pytest.approx(0.5) and answer["choice"] == "upcycle"
    assert any("earlier checkpoint" in reason for reason in answer["reasons"])
    assert main(["plan", "upcycle", "--dense-tokens", "2T", "--moe-tokens", "-1"]) == 2
    assert "--moe-tokens must be more than 0" in capsys.readouterr().err
